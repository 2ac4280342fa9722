#!/bin/sh
# Starts nginx with this container's own name server.
set -eu
server=$(awk '/^nameserver/ {print $2; exit}' /etc/resolv.conf)
case $server in *:*) server="[$server]" ;; esac
sed "s/RESOLVER/$server/" /etc/cotune/nginx.conf >/tmp/nginx.conf
exec nginx -e /dev/stderr -c /tmp/nginx.conf
