"""A table of results as a spreadsheet: numbers as numbers, the best of a row bold, details and sources on sheets of their own."""

from pathlib import Path
from typing import Any

import openpyxl
from openpyxl.styles import Alignment, Border, Font, Side
from openpyxl.utils import get_column_letter

from llava.eval.report import Table, notes

BOLD, LINE = Font(bold=True), Side(style="thin")
FORMATS = {"p": "0.000", "n": "#,##0", "difference": "+0.0;-0.0;0.0"}  # else one digit
Column = tuple[str, str, str]  # title, kind (value, low, high, n, p, difference), model


def write_workbook(table: Table, path: Path) -> None:
    book = openpyxl.Workbook()
    table_sheet(book.active, table)
    details_sheet(book.create_sheet("details"), table)
    sources = book.create_sheet("sources")
    for line in notes(table):
        sources.append(line.split(": ", 1))
    sources.column_dimensions["A"].width, sources.column_dimensions["B"].width = 28, 60
    book.save(path)


def columns_of(table: Table) -> list[Column]:
    found: list[Column] = [("benchmark", "name", ""), ("n", "n", "")]
    for name in table.columns:
        found.append((name, "value", name))
        known = [table.entries[row, name] for row in table.rows if (row, name) in table.entries]
        if any(entry.low is not None for entry in known):
            found += [("low", "low", name), ("high", "high", name)]
    for name in table.compared():
        title = f"{name} - {table.columns[0]}"
        found += [
            (title, "difference", name),
            ("low", "change low", name),
            ("high", "change high", name),
            ("p", "p", name),
        ]
    return found


def value_of(table: Table, row: str, kind: str, name: str) -> Any:
    entry, change = table.entries.get((row, name)), table.differences.get((row, name))
    if kind == "name":
        return row
    if kind == "n":
        known = [table.entries[row, column] for column in table.columns if (row, column) in table.entries]
        return next((item.questions for item in known if item.questions), None)
    if kind in ("value", "low", "high"):
        return getattr(entry, kind, None)
    return getattr(change, {"difference": "value", "p": "p"}.get(kind, kind.removeprefix("change ")), None)


def table_sheet(sheet, table: Table) -> None:
    columns = columns_of(table)
    sheet.title = "table"
    sheet.append([title for title, _, _ in columns])
    for row in table.rows:
        sheet.append([value_of(table, row, kind, name) for _, kind, name in columns])
        for cell, (_, kind, name) in zip(sheet[sheet.max_row], columns, strict=True):
            cell.number_format = FORMATS.get("difference" if kind.startswith("change") else kind, "0.0")
            if kind == "value" and name in table.best(row):
                cell.font = BOLD
    if table.averages:
        averages = {("value", name): number for name, number in table.averages.items()}
        for name in table.compared():
            averages["difference", name] = table.averages[name] - table.averages[table.columns[0]]
        sheet.append(["average", *(averages.get((kind, name)) for _, kind, name in columns[1:])])
        for cell, (_, kind, _) in zip(sheet[sheet.max_row], columns, strict=True):
            cell.border, cell.number_format = Border(top=LINE), FORMATS.get(kind, "0.0")
    for cell in sheet[1]:
        cell.font, cell.border, cell.alignment = BOLD, Border(top=LINE, bottom=LINE), Alignment(wrap_text=True)
    for cell in sheet[sheet.max_row]:
        cell.border = Border(top=cell.border.top, bottom=LINE)
    sheet.freeze_panes = "B2"
    for place, (title, kind, _) in enumerate(columns, 1):
        width = 18 if kind == "name" else 14 if kind in ("value", "difference") and len(title) > 8 else 9
        sheet.column_dimensions[get_column_letter(place)].width = width


def details_sheet(sheet, table: Table) -> None:
    """Categories and further numbers of every benchmark."""
    sheet.append(["benchmark", "part", *table.columns])
    for row in table.rows:
        known = {name: table.entries[row, name].details for name in table.columns if (row, name) in table.entries}
        for part in dict.fromkeys(part for parts in known.values() for part in parts):
            sheet.append([row, part, *(known.get(name, {}).get(part) for name in table.columns)])
            for cell in sheet[sheet.max_row][2:]:
                cell.number_format = "0.0"
    for cell in sheet[1]:
        cell.font = BOLD
    sheet.column_dimensions["A"].width, sheet.column_dimensions["B"].width = 18, 36
