#!/usr/bin/env bash
# Builds the image and tries it the way compose.yaml runs it: locked down, healthy, an answer of the demo, and a stop in
# the middle of the next one, which is told so. Where no container engine is running it says so and does nothing.
set -euo pipefail
cd "$(dirname "$0")/../.."
image=${IMAGE:-chatproxy}

fail() {
    echo "smoke: $*" >&2
    exit 1
}

if ! docker version >/dev/null 2>&1; then
    echo "smoke: no container engine is running here, so the image was not tried"
    exit 0
fi
docker build --tag "$image" .
container=$(docker run --detach --publish 127.0.0.1::8000 --read-only --cap-drop ALL --security-opt no-new-privileges \
    --memory 512m --pids-limit 64 --env DRAIN_TIMEOUT=0.2 "$image")
stream=$(mktemp)
trap 'docker rm --force "$container" >/dev/null; rm "$stream"' EXIT
address=$(docker port "$container" 8000)

for _ in {1..100}; do
    health=$(docker inspect --format '{{.State.Health.Status}}' "$container")
    [ "$health" = starting ] || break
    sleep 0.1
done
[ "$health" = healthy ] || fail "the container is $health: $(docker logs "$container" 2>&1)"

ask() {
    curl --silent --show-error --no-buffer --max-time 60 --header 'Content-Type: application/json' \
        --data '{"messages": [{"role": "user", "content": "Hi"}]}' "http://$address/api/chat"
}
answer=$(ask)
[ "$(tail --lines 1 <<<"$answer")" = 'data: [DONE]' ] || fail "an answer without an end: $answer"

ask >"$stream" &
until grep --quiet '^data: ' "$stream"; do
    kill -0 $! 2>/dev/null || fail "no second answer"
    sleep 0.1
done
docker stop "$container" >/dev/null
wait $!
grep --quiet --fixed-strings '"code":"draining"' "$stream" || fail "the stop was not told: $(cat "$stream")"
code=$(docker inspect --format '{{.State.ExitCode}}' "$container")
[ "$code" = 0 ] || fail "exit code $code: $(docker logs "$container" 2>&1)"
written=$(docker diff "$container")
[ -z "$written" ] || fail "files were written: $written"
echo "smoke: healthy, answers, tells of its stop, leaves nothing behind"
