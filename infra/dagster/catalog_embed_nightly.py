"""Every night: bring the embedding index in step with the catalog. Dagster 1.8 or newer.

What fails is told by the exit code of the run (docs/operations.md): a lease that is held and an interruption are tried
again; a failed gate, a tripped guard and a mistake in the configuration are not, because the same run would end the same.
"""

# No `from __future__ import annotations`: Dagster reads the annotation of `context` when the op is defined.
import subprocess

from dagster import DefaultScheduleStatus, Definitions, Failure, OpExecutionContext, RetryRequested, ScheduleDefinition, job, op

NAME = "$name"
TIMEZONE = "$timezone"
AT = "$at"
# `--since last` starts at the published watermark, so a night that was missed is made up for by the next one.
COMMAND = "$command"
DEADLINE_S = 20 * 3600
RETRIES = 3
# A lease of a dead run on another machine lasts 10 minutes.
RETRY_DELAY_S = 20 * 60

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


def exit_code(command: list[str], *, deadline_s: float) -> int:
    """Run a command and return its exit code; it ends with us, and at the deadline."""
    process = subprocess.Popen(command)
    try:
        return process.wait(deadline_s)
    except subprocess.TimeoutExpired as error:
        raise Failure(
            f"not done after {deadline_s / 3600:g} hours; what is finished is kept for the next run", allow_retries=False
        ) from error
    finally:
        if process.poll() is None:
            # The run releases its lease on SIGTERM.
            process.terminate()
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@op(name=f"{NAME}_run")
def run_command(context: OpExecutionContext) -> None:
    """Run the command and fail as its exit code asks."""
    code = exit_code(COMMAND, deadline_s=DEADLINE_S)
    if code == 0:
        return
    # Below zero: killed by a signal. What was finished is kept, as after 14.
    meaning = MEANINGS.get(code, "ended by a signal" if code < 0 else "not an exit code of catalog-embed: is COMMAND right?")
    told = f"exit code {code}: {meaning}. See docs/operations.md."
    context.log.warning(told)
    if code in WORTH_A_RETRY or code < 0:
        raise RetryRequested(max_retries=RETRIES, seconds_to_wait=RETRY_DELAY_S)
    raise Failure(told, allow_retries=False)


@job(name=NAME, description=__doc__)
def nightly() -> None:
    """One run of one command; two at once are kept apart by the lease in the store."""
    run_command()


defs = Definitions(
    jobs=[nightly],
    schedules=[
        ScheduleDefinition(
            name=f"{NAME}_schedule",
            job=nightly,
            cron_schedule=AT,
            execution_timezone=TIMEZONE,
            default_status=DefaultScheduleStatus.RUNNING,
        )
    ],
)
