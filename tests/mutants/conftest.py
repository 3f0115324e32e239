"""Prints the table exercise x mutant x diagnosis after the tests.

With pytest-xdist the table is printed by the controlling process, which reads only tests/conftest.py: that file
imports the hook from here. Without xdist both files offer it, so it looks whether the table is there already.
"""


def pytest_terminal_summary(terminalreporter):
    rows = sorted({
        tuple(content)
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, content in getattr(report, "user_properties", ())
        if name == "mutant"
    })
    if not rows or getattr(terminalreporter, "mutants_shown", False):
        return
    terminalreporter.mutants_shown = True
    rows = [("exercise", "mutant", "diagnosis"), *rows]
    widths = [max(len(row[n]) for row in rows) for n in range(2)]
    terminalreporter.section("mutants")
    for exercise, mutant, diagnosis in rows:
        terminalreporter.write_line(f"{exercise:<{widths[0]}}  {mutant:<{widths[1]}}  {diagnosis}")
