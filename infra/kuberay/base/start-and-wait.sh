#!/usr/bin/env bash
# Create the RayJob of a manifest, wait for its end, and exit as it did: 0 succeeded, 1 failed, refused or deleted,
# 2 wrong usage, 75 the API server is away, 143 stopped. After 75 or 143 the same Job's next pod waits for the same RayJob.
#
#   start-and-wait.sh nightly-rayjob.yaml
#
# JOB_NAME and JOB_UID (of the Job that runs this) name the RayJob and own it: created twice it is still one, and it
# leaves with its Job. Without them Kubernetes makes up a name. POLL_S: seconds between two looks; MISSES: how many
# looks in a row may fail.
set -uo pipefail

manifest=${1:-}
[ -f "$manifest" ] || { echo "start-and-wait: no manifest at '$manifest'. Give the path of a RayJob." >&2; exit 2; }
namespace=${NAMESPACE:-catalog-embed}
job=${JOB_NAME:-}
# Not the Job's own name: KubeRay calls the Job that submits like the RayJob, would find this one, and never submit.
wanted=${job:+$job-run}
poll_s=${POLL_S:-15}
# Misses in a row before giving up: five minutes at 15 s.
misses_allowed=${MISSES:-20}
name=""

kube() { kubectl --namespace "$namespace" --cache-dir /tmp/kube --request-timeout 30s "$@"; }

say() { printf '%s %s\n' "$(date -u +%FT%TZ)" "$*"; }

# A trap waits for the command that runs; `wait` does not. So sleeps and calls run beside, and SIGTERM is answered at once.
stopped() {
    trap - TERM INT
    local beside
    beside=$(jobs -p)
    # shellcheck disable=SC2086  one word for each process
    [ -z "$beside" ] || kill $beside 2>/dev/null
    say "stopped while waiting. RayJob ${name:-(not yet created)} goes on by itself: kubectl -n $namespace get rayjob ${name:-}" >&2
    exit 143
}
trap stopped TERM INT

pause() { sleep "$1" & wait $!; }

manifest_named() {
    if [ -z "$job" ]; then
        cat "$manifest"
        return
    fi
    owners=""
    [ -z "${JOB_UID:-}" ] || owners=",\"ownerReferences\":[{\"apiVersion\":\"batch/v1\",\"kind\":\"Job\",\"name\":\"$job\",\"uid\":\"$JOB_UID\"}]"
    # --local: nothing is asked of the server, which is how a name gets into a file of any layout.
    kubectl patch --local --filename "$manifest" --type merge --patch "{\"metadata\":{\"name\":\"$wanted\"$owners}}" --output yaml
}

create() {
    local made tries=0 error
    error=$(mktemp) && named=$(mktemp) || exit 75
    if ! manifest_named >"$named" 2>"$error"; then
        say "cannot read $manifest: $(cat "$error")" >&2
        exit 1
    fi
    while true; do
        if made=$(kube create --filename "$named" --output name 2>"$error"); then
            name=${made##*/}
            say "created RayJob $name"
            return
        fi
        if grep -q AlreadyExists "$error" && [ -n "$job" ]; then
            name=$wanted
            say "RayJob $name is there already: waiting for it"
            return
        fi
        # Only a named one may be tried again: an answer that was lost must not make two.
        tries=$((tries + 1))
        if grep -qE 'Forbidden|Invalid|BadRequest|NotFound|unknown field|no matches for kind|denied the request' "$error"; then
            say "the RayJob was refused: $(cat "$error"). Mend nightly-rayjob.yaml or access.yaml; is KubeRay installed?" >&2
            exit 1
        elif [ -z "$job" ] || [ "$tries" -ge "$misses_allowed" ]; then
            say "cannot create the RayJob: $(cat "$error")" >&2
            exit 75
        fi
        pause "$poll_s"
    done
}

# The operator's message quotes the last lines of the driver, with its exit code.
explain() {
    local code
    say "RayJob $name: $1, job ${2:-not started}${3:+, reason $3}"
    [ -z "$4" ] || printf '%s\n' "$4"
    code=$(grep -oE 'exit code [0-9]+' <<<"$4" | head -n 1 | grep -oE '[0-9]+')
    [ -z "$code" ] || say "catalog-embed ended with $code: see Exit codes in docs/operations.md"
}

follow() {
    local state before="" misses=0 answer error deployment status reason message
    error=$(mktemp) && answer=$(mktemp) || exit 75
    while true; do
        kube get rayjob "$name" --output \
            'jsonpath={.status.jobDeploymentStatus}|{.status.jobStatus}|{.status.reason}|{.status.message}' >"$answer" 2>"$error" &
        if wait $!; then
            misses=0
            IFS='|' read -r -d '' deployment status reason message <"$answer"
            message=${message%$'\n'}
            state="${deployment:-New} ${status:-}"
            [ "$state" = "$before" ] || say "RayJob $name: $state"
            before=$state
            case "$deployment" in
                Complete)
                    explain "$deployment" "$status" "$reason" "$message"
                    [ "$status" = SUCCEEDED ] && exit 0
                    exit 1
                    ;;
                Failed | ValidationFailed)
                    explain "$deployment" "$status" "$reason" "$message" >&2
                    exit 1
                    ;;
            esac
        elif grep -q NotFound "$error"; then
            say "RayJob $name was deleted while it ran. What is published is untouched; the next night makes up for it." >&2
            exit 1
        else
            misses=$((misses + 1))
            say "cannot look at RayJob $name ($misses of $misses_allowed): $(cat "$error")" >&2
            [ "$misses" -lt "$misses_allowed" ] || exit 75
        fi
        pause "$poll_s"
    done
}

create
follow
