"""Tables of scores from files: which policy their rows are samples of, and large parquet files in the memory of their columns."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from constrained_dpo.dual import ScoreTable
from constrained_dpo.problem import ConstrainedProblem
from data_prep.settings import UserError
from data_prep.tables import read_parquet, read_table, require_columns

LOG_PROBABILITIES = ("sample_logp", "ref_logp")
BATCH_ROWS = 1 << 16


@dataclass(frozen=True)
class ScoreFile:
    """table, and `taken_as`: one line about the policy its rows are taken to be samples of, None where its column source says so."""

    table: ScoreTable
    taken_as: str | None


@dataclass(frozen=True)
class _Columns:
    """A file's columns as arrays of length num_responses: the numbers of the rows' prompts, the scores (1 + m, num_responses),
    log-probabilities by name (NaN where null), and whether `source` says reference in every row (None: no such column)."""

    codes: np.ndarray
    scores: np.ndarray
    logps: dict[str, np.ndarray]
    all_reference: bool | None


def read_scores(path: Path, problem: ConstrainedProblem, assume_reference: bool = False) -> ScoreFile:
    """Reads `prompt_id` and the problem's columns; weights rows of another policy by their log-probabilities, or refuses them.

    Rows are samples of π_ref where `source` starts with "reference", where there is no such column, or with `assume_reference`. Other
    rows need a finite `sample_logp` and `ref_logp` (nats): they get the importance weight π_ref/q. Raises UserError.

    Of a parquet file only these columns are read, batch by batch, into float64 arrays: 8·(m + 1) + 4 bytes a row, and one row group.
    Other formats go through a frame.
    """
    path = Path(path)
    columns = _parquet_columns(path, problem) if path.suffix == ".parquet" else None
    if columns is None:
        columns = _frame_columns(path, problem)
    log_weight, taken_as = _log_weight(columns, path, assume_reference)
    scores = columns.scores
    return ScoreFile(ScoreTable.from_columns(columns.codes, scores[0], scores[1:], log_weight), taken_as)


def _log_weight(columns: _Columns, path: Path, assume_reference: bool) -> tuple[np.ndarray | None, str | None]:
    """log π_ref − log q of every row, None for samples of π_ref, and the line about it."""
    if columns.all_reference or assume_reference:
        return None, None if columns.all_reference else "taken as the reference policy's samples (--assume-reference)"
    known = [np.isfinite(columns.logps[n]) for n in LOG_PROBABILITIES if n in columns.logps]
    if len(known) == 2 and all(k.all() for k in known):
        weight = columns.logps["ref_logp"] - columns.logps["sample_logp"]
        return weight, "samples weighted by exp(ref_logp − sample_logp), the reference policy's probability over their sampler's"
    what = "finite sample_logp and ref_logp in every row (they are then weighted), or --assume-reference"
    if columns.all_reference is False:
        raise UserError(f"{path}: holds responses that are not the reference policy's (column source); keep only those, or give {what}")
    if any(k.any() for k in known):
        raise UserError(f"{path}: sample_logp and ref_logp are not known in every row; give {what}")
    return None, "no column source: taken as the reference policy's samples"


def _frame_columns(path: Path, problem: ConstrainedProblem) -> _Columns:
    needed = ["prompt_id", *problem.objectives]
    optional = ["source", "response_id", *LOG_PROBABILITIES]
    if path.suffix == ".parquet":
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        present = pq.read_schema(path).names
        frame = read_parquet(path, [c for c in present if c in (*needed, *optional)])
    else:
        frame = read_table(path)
    table = ScoreTable.from_frame(frame, problem)  # the checks, with the rows' names
    del table
    logps = {n: pd.to_numeric(frame[n], errors="coerce").to_numpy(np.float64, na_value=np.nan) for n in LOG_PROBABILITIES if n in frame}
    source = frame["source"].astype(str).str.startswith("reference").all() if "source" in frame else None
    scores = np.stack([frame[c].to_numpy(np.float64) for c in problem.objectives])
    return _Columns(pd.factorize(frame["prompt_id"])[0], scores, logps, None if source is None else bool(source))


def _parquet_columns(path: Path, problem: ConstrainedProblem) -> _Columns | None:
    """The columns, batch by batch; None where a column is not plain finite numbers: `_frame_columns` finds the words for that."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        present = pq.read_schema(path).names
        with pq.ParquetFile(path, read_dictionary=[n for n in ("prompt_id", "source") if n in present]) as file:
            shape = pd.DataFrame(columns=present, index=range(min(file.metadata.num_rows, 1)))
            require_columns(shape, ["prompt_id", *problem.objectives], str(path))
            return _read_batches(file, problem.objectives, present)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]}); write it again") from error


def _read_batches(file: pq.ParquetFile, objectives: list[str], present: list[str]) -> _Columns | None:
    rows, logp_names = file.metadata.num_rows, [n for n in LOG_PROBABILITIES if n in present]
    wanted = [*objectives, *logp_names]
    if any(not (pa.types.is_floating(t) or pa.types.is_integer(t)) for t in (file.schema_arrow.field(n).type for n in wanted)):
        return None
    codes, scores = np.empty(rows, np.int32), np.empty((len(objectives), rows))
    logps = {n: np.empty(rows) for n in logp_names}
    numbers: dict[object, int] = {}
    all_reference, first = True if "source" in present else None, 0
    columns = ["prompt_id", *wanted, *(["source"] if "source" in present else [])]
    # One row group at a time: over all of them at once pyarrow would hold the whole file's compressed columns.
    for batch in (b for g in range(file.num_row_groups) for b in file.iter_batches(BATCH_ROWS, row_groups=[g], columns=columns)):
        part = slice(first, first + len(batch))
        ids = batch.column("prompt_id")
        if ids.null_count:
            return None
        codes[part] = _codes(ids, numbers)
        for target, name in zip(scores, objectives, strict=True):
            target[part] = batch.column(name).to_numpy(zero_copy_only=False)
        for name in logp_names:
            logps[name][part] = batch.column(name).to_numpy(zero_copy_only=False)
        if all_reference:
            sources = batch.column("source").unique().to_pylist()
            all_reference = all(str(s).startswith("reference") for s in sources)
        if not np.isfinite(scores[:, part]).all():
            return None
        first += len(batch)
    return _Columns(codes, scores, logps, all_reference)


def _codes(ids: pa.Array, numbers: dict[object, int]) -> np.ndarray:
    """The numbers of a batch's prompts in order of first appearance in the file; `numbers` holds those met so far and grows."""
    encoded = ids if pa.types.is_dictionary(ids.type) else ids.dictionary_encode()
    indices = encoded.indices.to_numpy()
    met, first = np.unique(indices, return_index=True)
    met = met[np.argsort(first)]
    translation = np.empty(len(encoded.dictionary), np.int32)
    translation[met] = [numbers.setdefault(name, len(numbers)) for name in encoded.dictionary.take(pa.array(met)).to_pylist()]
    return translation[indices]
