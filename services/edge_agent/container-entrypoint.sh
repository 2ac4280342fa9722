#!/bin/sh
# Enrols once, then runs the agent. The identity lives in the volume, so a new container is the same device.
# Server and token are read from COTUNE_SERVER and COTUNE_TOKEN: a command line could be read by every process.
set -eu
home=/var/lib/cotune-agent
if [ ! -f "$home/agent.toml" ]; then
    cotune-agent enroll --home "$home" --name "$COTUNE_DEVICE_NAME" --model "$COTUNE_MODEL" --data "$COTUNE_DATA"
fi
exec cotune-agent start --home "$home"
