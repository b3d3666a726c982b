// Sorts the samples by the change of one score; without scripts the page shows them in the order of the prompts.
(() => {
  const list = document.getElementById("cards");
  const select = document.getElementById("sort");
  if (!list || !select) return;
  const cards = Array.from(list.children);
  const change = (card, index) => Number(card.dataset["change" + index]);
  select.addEventListener("change", () => {
    const [index, sign] = select.value.split(" ");
    const sorted = cards.slice();
    if (sign) sorted.sort((a, b) => Number(sign) * (change(a, index) - change(b, index)));
    list.replaceChildren(...sorted);
  });
  document.getElementById("controls").hidden = false;
})();
