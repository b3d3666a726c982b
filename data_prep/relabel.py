"""`cdpo data relabel`: a file of scored responses to a file of pairs or groups, in the memory of a block of prompts.

A parquet file with more than BLOCK_ROWS rows is read in blocks of whole prompts in ascending order of prompt_id, as a run's own tables are
sorted. Where it is not sorted, a prompt's rows lying anywhere in it, it is first dealt out into such blocks in temporary files beside the
output. Blocks are labelled one after the other and written as row groups. Draws depend on ids alone and rows come by prompt, so the result
is that of `label_pairs` or `label_groups` on the whole table.

Memory, beside the libraries: 8 bytes per response (hashes that show that no id comes twice), one batch and one block of the needed columns
(texts with --text only), and PIECE_PAIRS pairs twice, or all pairs of one prompt where it has more. Disk: the needed columns, uncompressed,
where the file is not sorted. Other formats, and columns of other types than text ids and numbers, are read whole and make one block.
"""

import math
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.preferences import (
    Labels,
    PromptRows,
    all_differ,
    group_ids,
    group_rows,
    hash_ids,
    lagrangian_score,
    no_group,
    no_pair,
    pair_pieces,
    require_responses,
)
from data_prep.settings import UserError
from data_prep.tables import read_parquet, read_table, replacing, require_columns, require_finite, require_unique

BLOCK_ROWS = 1 << 16
MAX_BLOCKS = 512  # open files; a table of more than 33 million rows has larger blocks
IDS, TEXTS = ("prompt_id", "response_id"), ("prompt", "response")
HASH = "hash of response_id"
DICTIONARY_BYTES = 1 << 28  # each text once per row group, up to here; beyond, once per pair


def relabel_pairs(
    path: Path,
    output: Path,
    reward: str,
    lambda_: pd.Series,
    *,
    labels: Labels,
    pairs_per_prompt: int | None,
    seed: int,
    text: bool,
    prompt_texts: pd.Series | None = None,
    block_rows: int = BLOCK_ROWS,
) -> dict[str, object]:
    """Writes `label_pairs` of a file (parquet, csv, tsv, json, jsonl), with `text` also the columns prompt, chosen and rejected (texts).

    prompt_texts: by prompt_id; None: the file's column prompt (the first row of each prompt).

    Returns counts: pairs, prompts (with a pair), ambiguous_fraction (share of pairs with 0.05 < prob < 0.95), single_response (prompts
    left out). Raises UserError on a bad table, or where no prompt has two responses.
    """
    pairs = prompts = ambiguous = singles = 0
    columns = [*IDS, reward, *lambda_.index]
    if text:
        columns += ["response"] if prompt_texts is not None else TEXTS
    with replacing(output) as temporary, _row_groups(temporary) as write, closing(_blocks(path, columns, output, block_rows)) as blocks:
        for block, hashes in blocks:
            rows, score = PromptRows.of(block, hashes), lagrangian_score(block, reward, lambda_)
            prompts, singles = prompts + int((rows.counts > 1).sum()), singles + int((rows.counts == 1).sum())
            texts = [(name, block[name]) for name in IDS]
            if text:
                texts += [("prompt", _prompts_of(block, rows.codes, prompt_texts)), ("response", block["response"])]
            arrays = {name: _arrow(column) for name, column in texts}
            for piece in pair_pieces(rows, score, labels=labels, pairs_per_prompt=pairs_per_prompt, seed=seed):
                of = {name: _encoded(array.take(pa.array(piece.rows)), name) for name, array in arrays.items()}
                table = {
                    "prompt_id": _taken(of["prompt_id"], piece.chosen),
                    "chosen_id": _taken(of["response_id"], piece.chosen),
                    "rejected_id": _taken(of["response_id"], piece.rejected),
                    "prob": piece.prob, "target": piece.target, "margin": piece.margin,
                }  # fmt: skip
                if text:
                    table["prompt"] = _taken(of["prompt"], piece.chosen)
                    table |= {side: _taken(of["response"], getattr(piece, side)) for side in ("chosen", "rejected")}
                write(pa.table(table))
                pairs, ambiguous = pairs + len(piece.prob), ambiguous + int((np.abs(piece.prob - 0.5) < 0.45).sum())
        if not pairs:
            raise no_pair()
    return {"pairs": pairs, "prompts": prompts, "ambiguous_fraction": ambiguous / pairs, "single_response": singles}


def relabel_groups(
    path: Path,
    output: Path,
    reward: str,
    lambda_: pd.Series,
    *,
    group_size: int,
    groups_per_prompt: int,
    seed: int,
    block_rows: int = BLOCK_ROWS,
) -> dict[str, int]:
    """Writes `label_groups` of a file. Returns counts: groups, prompts (with groups), too_few_responses (prompts left out).

    Raises UserError on a bad table, or where no prompt has `group_size` responses.
    """
    prompts = left_out = 0
    columns = [*IDS, reward, *lambda_.index]
    with replacing(output) as temporary, _row_groups(temporary) as write, closing(_blocks(path, columns, output, block_rows)) as blocks:
        for block, hashes in blocks:
            found, score = PromptRows.of(block, hashes), lagrangian_score(block, reward, lambda_)
            grouped = group_rows(found, group_size=group_size, groups_per_prompt=groups_per_prompt, seed=seed)
            prompts, left_out = prompts + len(grouped), left_out + len(found.counts) - len(grouped)
            if not len(grouped):
                continue
            ids = {name: _arrow(block[name]) for name in IDS}
            names = ids["prompt_id"].take(pa.array(grouped[:, 0, 0])).dictionary_encode()
            groups = pa.array(group_ids(names.to_pylist(), groups_per_prompt), pa.large_string()).dictionary_encode()
            rows = grouped.reshape(-1)
            at = np.arange(len(rows)) // group_size
            write(
                pa.table(
                    {
                        "prompt_id": _taken(names, at // groups_per_prompt),
                        "group_id": _taken(groups, at),
                        "response_id": _taken(_encoded(ids["response_id"], "response_id"), rows),
                        "score": score[rows],
                    }
                )
            )
        if not prompts:
            raise no_group(group_size)
    return {"groups": prompts * groups_per_prompt, "prompts": prompts, "too_few_responses": left_out}


def _prompts_of(block: pd.DataFrame, codes: np.ndarray, known: pd.Series | None) -> pd.Series:
    """The text of every row's prompt."""
    if known is None:
        return block["prompt"].take(np.unique(codes, return_index=True)[1][codes])
    missing = ~block["prompt_id"].isin(known.index)
    if missing.any():
        raise UserError(
            f"--prompts: has no prompt_id {block['prompt_id'][missing].iloc[0]!r}, which the responses name; give their own table"
        )
    return block["prompt_id"].map(known)


def read_prompt_texts(path: Path) -> pd.Series:
    """`prompt` by prompt_id, from a table that has both (a run's prompts.parquet, say). Raises UserError."""
    table = read_table(path)
    require_columns(table, ["prompt_id", "prompt"], str(path))
    require_unique(table, ["prompt_id"], str(path))
    return table.astype({"prompt_id": str}).set_index("prompt_id")["prompt"]


def _arrow(texts: pd.Series) -> pa.Array:
    array = pa.array(texts, pa.large_string())  # large: the texts of a block may be more than 2 GiB
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def _encoded(texts: pa.Array, name: str) -> pa.DictionaryArray:
    """As a dictionary, whose entries must differ; response ids do."""
    if name == "response_id":
        return pa.DictionaryArray.from_arrays(pa.array(np.arange(len(texts), dtype=np.int32)), texts)
    return texts.dictionary_encode()


def _taken(encoded: pa.DictionaryArray, places: np.ndarray) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(encoded.indices.to_numpy()[places]), encoded.dictionary)


@contextmanager
def _row_groups(path: Path) -> Iterator[Callable[[pa.Table], None]]:
    """Yields what writes a table as a row group; it compresses in a thread of its own while the next one is made."""
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(1))
        writer: pq.ParquetWriter | None = None
        pending: list[Future] = []

        def write(table: pa.Table) -> None:
            nonlocal writer
            if writer is None:
                # Without the Arrow schema readers see plain texts, not dictionaries.
                encoded = [f.name for f in table.schema if pa.types.is_dictionary(f.type)]
                settings = {"compression": "zstd", "use_dictionary": encoded, "dictionary_pagesize_limit": DICTIONARY_BYTES}
                writer = stack.enter_context(pq.ParquetWriter(path, table.schema, store_schema=False, **settings))
                stack.callback(wait, pending)  # before the writer is closed, also after an error
            for last in pending:
                last.result()
            pending[:] = [pool.submit(writer.write_table, table)]

        yield write
        for last in pending:
            last.result()


def _blocks(path: Path, columns: list[str], output: Path, block_rows: int) -> Iterator[tuple[pd.DataFrame, np.ndarray]]:
    """Blocks of whole prompts, ascending by prompt_id, with the hashes of their response ids."""
    path, output, columns = Path(path), Path(output), list(dict.fromkeys(columns))
    if not _plain(path, columns) or pq.read_metadata(path).num_rows <= block_rows:
        yield _whole(path, columns)
        return
    bounds = _bounds(path, block_rows)
    if bounds is None:
        if not (yield from _sorted_blocks(path, columns, block_rows)):
            frame, _ = _whole(path, columns)
            require_finite(frame, _numbers(columns), "responses")
        return  # two ids with one hash, at worst
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        files = _deal(path, columns, Path(folder), bounds)
        for file in files or []:
            with pa.OSFile(str(file)) as source, pa.ipc.open_stream(source) as reader:
                block = reader.read_all().to_pandas()
            file.unlink()
            yield block.drop(columns=HASH), block[HASH].to_numpy()
    if not files:
        yield _whole(path, columns)


def _whole(path: Path, columns: list[str]) -> tuple[pd.DataFrame, np.ndarray]:
    """The needed columns of the whole table and the hashes of its response ids; raises UserError with all rows that are wrong."""
    frame = read_parquet(path, columns) if _plain(path, columns) else read_table(path)
    require_columns(frame, IDS, "responses")
    for name in IDS:
        if frame[name].dtype != "str":
            frame[name] = frame[name].map(str, na_action="ignore")  # ids that are numbers
    hashes = require_responses(frame)
    texts = [name for name in TEXTS if name in columns]
    if texts:
        require_columns(frame, texts, "responses (--text)")
        for name in texts:
            odd = np.flatnonzero([not isinstance(value, str) for value in frame[name]])
            if len(odd):
                raise UserError(f"responses (--text): column {name} is not a text in row {odd[0]} ({len(odd)} rows); mend or remove them")
    return frame, hashes


def _plain(path: Path, columns: list[str]) -> bool:
    """Whether this is a parquet file with text ids and texts, and numbers in the other columns."""
    if path.suffix != ".parquet" or not path.is_file():
        return False
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowInvalid, OSError):
        return False  # reading it says what is wrong
    types = {f.name: f.type for f in schema}
    if any(name not in types for name in columns):
        return False
    texts = {name for name in columns if pa.types.is_string(types[name]) or pa.types.is_large_string(types[name])}
    numbers = {name for name in columns if pa.types.is_floating(types[name]) or pa.types.is_integer(types[name])}
    return texts == {*IDS, *TEXTS} & {*columns} and texts | numbers == {*columns}


def _batches(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Batches of BLOCK_ROWS rows; raises UserError where the file is broken."""
    try:
        # One row group after the other, and not read ahead: else pyarrow holds the compressed columns of all of them.
        with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            for group in range(file.num_row_groups):
                yield from file.iter_batches(BLOCK_ROWS, row_groups=[group], columns=columns)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]}); write it again") from error


def _numbers(columns: list[str]) -> list[str]:
    return [c for c in columns if c not in (*IDS, *TEXTS)]


class _Hashes:
    """Hashes of the response ids seen so far, in a buffer for `rows` of them."""

    def __init__(self, rows: int) -> None:
        self.seen, self.count = np.empty(rows, np.uint64), 0

    def of(self, batch: pa.RecordBatch, numbers: list[str]) -> np.ndarray | None:
        """The batch's hashes; None where a value is missing or infinite."""
        if any(column.null_count for column in batch.columns):
            return None
        if not all(np.isfinite(batch.column(name).to_numpy(zero_copy_only=False)).all() for name in numbers):
            return None
        part = slice(self.count, self.count + len(batch))
        self.seen[part] = hash_ids(batch.column("response_id").to_pandas())
        self.count = part.stop
        return self.seen[part]


def _sorted_blocks(path: Path, columns: list[str], block_rows: int) -> Iterator[tuple[pd.DataFrame, np.ndarray]]:
    """The blocks of a sorted file. Returns False where the whole table has to be looked at: a missing or infinite value, or two equal
    hashes."""
    hashes, left = _Hashes(pq.read_metadata(path).num_rows), None
    for batch in _batches(path, columns):
        own = hashes.of(batch, _numbers(columns))
        if own is None:
            return False
        batch = pa.Table.from_batches([batch.append_column(HASH, pa.array(own))])
        left = batch if left is None else pa.concat_tables([left, batch])
        cut = pc.index(left["prompt_id"], left["prompt_id"][-1]).as_py() if len(left) >= block_rows else 0
        if cut:  # the last prompt's rows may go on
            yield _as_block(left.slice(0, cut))
            left = left.slice(cut)
    yield _as_block(left)
    return all_differ(hashes.seen)


def _as_block(table: pa.Table) -> tuple[pd.DataFrame, np.ndarray]:
    return table.drop_columns([HASH]).to_pandas(), table[HASH].to_numpy()


def _deal(path: Path, columns: list[str], folder: Path, bounds: np.ndarray) -> list[Path] | None:
    """The rows dealt out into one Arrow stream per block, in the order of their prompts, with the hashes of their ids; None where the
    whole table has to be looked at: a missing or infinite value, or two equal hashes."""
    hashes = _Hashes(pq.read_metadata(path).num_rows)
    with ExitStack() as stack:
        writers: dict[int, pa.ipc.RecordBatchStreamWriter] = {}
        for batch in _batches(path, columns):
            own = hashes.of(batch, _numbers(columns))
            if own is None:
                return None
            batch = batch.append_column(HASH, pa.array(own))
            ids = batch.column("prompt_id").dictionary_encode()
            names = ids.dictionary.to_numpy(zero_copy_only=False)
            block = np.searchsorted(bounds, names, side="right").astype(np.int16)[ids.indices.to_numpy()]
            batch = batch.take(pa.array(np.argsort(block, kind="stable")))
            met, counts = np.unique(block, return_counts=True)
            for number, start, count in zip(met.tolist(), np.cumsum(counts) - counts, counts, strict=True):
                if number not in writers:
                    sink = stack.enter_context(pa.OSFile(str(folder / f"{number:04d}"), "wb"))
                    writers[number] = stack.enter_context(pa.ipc.new_stream(sink, batch.schema))
                writers[number].write_batch(batch.slice(start, count))
    return [folder / f"{number:04d}" for number in sorted(writers)] if all_differ(hashes.seen) else None


def _bounds(path: Path, block_rows: int) -> np.ndarray | None:
    """Prompt ids that cut the rows into about equal blocks, ascending; from every n-th row. None where the file is sorted by prompt_id."""
    rows = pq.read_metadata(path).num_rows
    blocks = min(math.ceil(rows / block_rows), MAX_BLOCKS)
    step, first, sampled, last, in_order = max(1, rows // (256 * blocks)), 0, [], "", True
    for batch in _batches(path, ["prompt_id"]):
        ids = batch.column("prompt_id")
        if ids.null_count:
            in_order, ids = False, ids.fill_null("")
        in_order = in_order and last <= ids[0].as_py() and not pc.any(pc.less(ids[1:], ids[:-1])).as_py()
        last = ids[-1].as_py()
        sampled += ids.take(pa.array(np.arange(-first % step, len(ids), step))).to_pylist()
        first += len(ids)
    sampled.sort()
    return None if in_order else np.array(sorted({sampled[len(sampled) * i // blocks] for i in range(1, blocks)}), dtype=object)
