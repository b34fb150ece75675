"""Compare runs: a table here, and a page with tables, tests and plots that opens without a network.

Usage:
    mergelab report                              # the newest sweep, grid or single run
    mergelab report mini/rte                     # an experiment, whole
    mergelab report RUN_ID [RUN_ID ...]          # runs; a sweep or a grid with all that lies below it
    mergelab report mini/rte method=ties         # tags, as MLflow shows them (mergelab.method, or in short method)
    mergelab report --format=latex --output=FOLDER

``python -m mergelab.report`` is the same command. Runs of different tasks, examples, protocols or sources are kept
apart. Page and tables go to a folder, by default one below outputs/reports; the store is only read, without --log.
"""

from __future__ import annotations

import argparse
import sys

from mergelab.cli.command import guarded
from mergelab.console.formats import FORMATS, Format
from mergelab.console.progress import gathered_warnings, progress_bar
from mergelab.errors import MergelabError, one_line
from mergelab.tracking.secrets import without_password


def main(arguments: list[str] | None = None) -> int:
    """Write what was asked for and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="mergelab report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", help="experiments, run ids, tags as key=value; none: the newest")
    parser.add_argument("--format", choices=FORMATS, default="table", help="of what is printed (table)")
    parser.add_argument("--output", metavar="FOLDER", help="where the files go (outputs/reports/NAME)")
    parser.add_argument("--metric", help="what ranks, such as f1 or rte/accuracy (what the runs are judged by)")
    parser.add_argument("--tracking-uri", metavar="URI", help="the store (MLFLOW_TRACKING_URI, or outputs/mlflow.db)")
    parser.add_argument("--log", action="store_true", help="add the files to the sweep's, grid's or single run too")
    options = parser.parse_args(arguments)
    form: Format = options.format
    from mergelab.report.build import build_report

    try:
        with gathered_warnings(), progress_bar() as progress:
            report = build_report(options.runs, options.tracking_uri, options.metric, progress)
            page = report.write(options.output, log=options.log)
        report.print(form, page)
    except MergelabError as error:
        sys.stderr.write(f"error: {one_line(without_password(str(error)))}\n")
        return 2
    return 0


if __name__ == "__main__":
    guarded(lambda: sys.exit(main()))
