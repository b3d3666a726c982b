"""Tables of bench_family."""


def print_tables(records: list[dict]) -> None:
    pass
