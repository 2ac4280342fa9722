#!/bin/sh
# Makes the deployment's secrets in the folder $1 (default: secrets), each a long random string in a file of its own. What is
# there stays. The folder is for its owner only; the files in it can be read by the users of the containers, who meet
# them as /run/secrets/... and never see the folder.
set -eu
folder=${1:-secrets}
mkdir -p "$folder"
chmod 700 "$folder"
for name in operator.key database.password grafana.password; do
    [ -s "$folder/$name" ] && continue
    (umask 077 && head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' >"$folder/$name.new")
    chmod 444 "$folder/$name.new"
    mv "$folder/$name.new" "$folder/$name"
    echo "made $folder/$name"
done
