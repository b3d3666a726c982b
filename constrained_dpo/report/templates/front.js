// The slider: shows one setting's numbers and answers; without scripts the page shows all of them.
(() => {
  const slider = document.getElementById("slider");
  if (!slider) return;
  const panels = Array.from(document.querySelectorAll("[data-setting]"));
  const rows = Array.from(document.querySelectorAll("tr[data-row]"));
  const show = () => {
    const chosen = slider.value;
    for (const panel of panels) panel.hidden = panel.dataset.setting !== chosen;
    for (const row of rows) row.classList.toggle("chosen", row.dataset.row === chosen);
    const words = document.querySelector(`.panel[data-setting="${chosen}"]`).dataset.words;
    slider.setAttribute("aria-valuetext", words);
    document.getElementById("words").textContent = words;
  };
  slider.addEventListener("input", show);
  for (const row of rows) row.addEventListener("click", () => { slider.value = row.dataset.row; show(); });
  document.body.classList.add("sliding");
  document.getElementById("controls").hidden = false;
  show();
})();
