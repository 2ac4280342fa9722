#!/bin/sh
# Enrols once, then runs the agent. The identity lives in the volume, so a new container is the same device.
# Server and token are read from the environment, the token better from the file that COTUNE_TOKEN_FILE names: a command
# line could be read by every process.
set -eu
home=/var/lib/cotune-agent
if [ ! -f "$home/agent.toml" ]; then
    if [ -z "${COTUNE_TOKEN:-}" ] && [ -n "${COTUNE_TOKEN_FILE:-}" ]; then
        COTUNE_TOKEN=$(cat "$COTUNE_TOKEN_FILE")
        export COTUNE_TOKEN
    fi
    cotune-agent enroll --home "$home" --name "$COTUNE_DEVICE_NAME" --model "$COTUNE_MODEL" --data "$COTUNE_DATA" \
        ${COTUNE_TEST:+--test "$COTUNE_TEST"} ${COTUNE_DOMAIN:+--domain "$COTUNE_DOMAIN"}
fi
exec cotune-agent start --home "$home"
