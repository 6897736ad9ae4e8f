"""Every night: bring the embedding index in step with the catalog. Airflow 3, and 2.10 or newer.

What fails is told by the exit code of the run (docs/operations.md): a lease that is held and an interruption are tried
again; a failed gate, a tripped guard and a mistake in the configuration are not, because the same run would end the same.
"""

from __future__ import annotations

import subprocess
from datetime import timedelta

import pendulum

try:
    from airflow.sdk import DAG, BaseOperator
except ImportError:  # Airflow 2
    from airflow import DAG
    from airflow.models.baseoperator import BaseOperator

try:
    from airflow.sdk.exceptions import AirflowException, AirflowFailException
except ImportError:  # Airflow 2, and the first releases of 3
    from airflow.exceptions import AirflowException, AirflowFailException

NAME = "$name"
TIMEZONE = "$timezone"
AT = "$at"
# `--since last` starts at the published watermark, so a night that was missed is made up for by the next one.
COMMAND = "$command"
DEADLINE = timedelta(hours=20)
RETRIES = 3
# A lease of a dead run on another machine lasts 10 minutes.
RETRY_DELAY = timedelta(minutes=20)

MEANINGS = {
    1: "an error: the log says what failed and what to do next",
    2: "wrong usage or configuration: mend what the log names",
    10: "a generation was built, a gate failed, it was not published",
    11: "another run holds the lease, or published first",
    12: "a guard of the source tripped; the published generation is untouched",
    13: "too many rows quarantined; the published generation is untouched",
    14: "interrupted",
}
WORTH_A_RETRY = {11, 14}
GRACE_S = 60


class CatalogEmbed(BaseOperator):
    """Runs one command of catalog-embed, and ends it when Airflow ends the task."""

    def __init__(self, *, command: list[str], **options: object) -> None:
        super().__init__(**options)
        self.command = command
        self.process: subprocess.Popen[str] | None = None

    def execute(self, context: object) -> None:
        """Run the command, its lines in the task's log, and fail as its exit code asks."""
        del context
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        try:
            for line in self.process.stdout:
                self.log.info("%s", line.rstrip())
            code = self.process.wait()
        finally:
            self._end()
        if code == 0:
            return
        # Below zero: killed by a signal. What was finished is kept, as after 14.
        again = code in WORTH_A_RETRY or code < 0
        meaning = MEANINGS.get(code, "ended by a signal" if code < 0 else "not an exit code of catalog-embed: is COMMAND right?")
        raise (AirflowException if again else AirflowFailException)(f"exit code {code}: {meaning}. See docs/operations.md.")

    def on_kill(self) -> None:
        """Let the run release its lease; `execute` sees its end."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def _end(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


with DAG(
    dag_id=NAME,
    schedule=AT,
    start_date=pendulum.datetime(2026, 1, 1, tz=TIMEZONE),
    catchup=False,
    max_active_runs=1,
    tags=["catalog-embed"],
    doc_md=f"{__doc__}\n`catalog-embed status` says what is live; docs/operations.md says what every exit code asks for.",
):
    CatalogEmbed(
        task_id="run",
        command=COMMAND,
        execution_timeout=DEADLINE,
        retries=RETRIES,
        retry_delay=RETRY_DELAY,
    )
