"""Rows of results as text."""


def print_table(rows, columns, only_if_several=()):
    """One line a row. columns: {title: name of the field}; the first one is aligned to the left.

    A column stands only where a row has something there, and one of the titles `only_if_several`
    only where its values differ.
    """
    table = []
    for title, name in columns.items():
        values = [row.get(name) for row in rows]
        if set(values) <= {None} or title in only_if_several and len(set(values)) == 1:
            continue
        table.append([title, *map(shown, values)])
    widths = [max(map(len, column)) for column in table]
    for line in zip(*table):
        print("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]))


def shown(value):
    """A number with as many digits as one reads; "-" for None."""
    if value is None:
        return "-"
    if isinstance(value, float):
        if 0 < abs(value) < 1e-3:
            return f"{value:.1e}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)
