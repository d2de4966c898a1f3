"""Rows of results as text."""


def print_table(rows, columns, only_if_several=()):
    """Print a line for each row. columns: {title: name of the field}; the first is aligned left.

    A column without any value is left out. So is one of the titles `only_if_several` whose values
    are all the same.
    """
    table = []
    for title, name in columns.items():
        values = [row.get(name) for row in rows]
        all_the_same = len(set(values)) == 1
        if set(values) <= {None} or (title in only_if_several and all_the_same):
            continue
        table.append([title, *map(shown, values)])
    widths = [max(map(len, column)) for column in table]
    for line in zip(*table):
        print("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]))


def shown(value):
    """A value as text: a number with a readable number of digits, "-" for None."""
    if value is None:
        return "-"
    if isinstance(value, float):
        if 0 < abs(value) < 1e-3:
            return f"{value:.1e}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)
