"""Prints the table exercise x mutant x diagnosis after the tests, also when they ran in several processes."""


def pytest_terminal_summary(terminalreporter):
    rows = sorted({
        tuple(content)
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, content in getattr(report, "user_properties", ())
        if name == "mutant"
    })
    if not rows:
        return
    rows = [("exercise", "mutant", "diagnosis"), *rows]
    widths = [max(len(row[n]) for row in rows) for n in range(2)]
    terminalreporter.section("mutants")
    for exercise, mutant, diagnosis in rows:
        terminalreporter.write_line(f"{exercise:<{widths[0]}}  {mutant:<{widths[1]}}  {diagnosis}")
