#!/bin/sh
# Builds stand-ins for base images that cannot be pulled, from Debian packages and under the official names, so that
# the deployment can be brought up and tested on a machine without a registry. They are for `make compose-test` only:
# same paths, users and start commands as the official images as far as this deployment uses them, other versions.
#
#   sh scripts/compose/stand_in_images.sh python:3.11.13-slim-bookworm postgres:17.6-bookworm ...
#
# Needs root, podman, debootstrap, and a Debian host whose apt works: its mirrors are used, at build time only.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
debian=localhost/cotune-stand-in/debian:bookworm

mirror() { apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(CREATED_BY)' | awk '$2=="bookworm" && $3=="Packages" {print $1; exit}'; }

base() {
    podman image exists "$debian" && return
    debootstrap --variant=minbase --include=ca-certificates bookworm "$work/root" "$(mirror)" >"$work/log" 2>&1 ||
        { tail -n 5 "$work/log" >&2; exit 1; }
    # The updates too, as the host has them.
    apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(CREATED_BY)' |
        awk '$2 ~ /^bookworm/ && $3=="Packages" {print "deb " $1 " " $2 " main"}' | sort -u >"$work/root/etc/apt/sources.list"
    rm -rf "$work/root/var/cache/apt/archives" "$work/root/usr/share/doc" "$work/root/usr/share/man" "$work/root/usr/share/locale"
    tar -C "$work/root" --numeric-owner -c . | podman import --quiet - "$debian" >/dev/null
}

build() { # name, with a Dockerfile on standard input
    cat >"$work/Dockerfile"
    podman build --quiet --network host --tag "$1" --file "$work/Dockerfile" "$work" >/dev/null
}

install='apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends'
tidy='rm -rf /var/lib/apt/lists/* /var/cache/apt/* /usr/share/doc /usr/share/man'

python() {
    build "$1" <<EOF
FROM $debian
RUN $install python3 python3-venv && $tidy && ln -s /usr/bin/python3 /usr/local/bin/python
CMD ["python"]
EOF
}

postgres() {
    cat >"$work/docker-entrypoint.sh" <<'EOF'
#!/bin/sh
# The part of the official entrypoint that this deployment uses: a first start with a password from a file.
set -eu
bin=$(echo /usr/lib/postgresql/*/bin)
mkdir -p /var/run/postgresql
if [ ! -s "$PGDATA/PG_VERSION" ]; then
    "$bin/initdb" --username="$POSTGRES_USER" --pwfile="$POSTGRES_PASSWORD_FILE" --auth-local=trust --auth-host=scram-sha-256 -D "$PGDATA"
    echo 'host all all all scram-sha-256' >>"$PGDATA/pg_hba.conf"
    "$bin/pg_ctl" -D "$PGDATA" -o '-c listen_addresses=' -w start
    "$bin/createdb" --username="$POSTGRES_USER" "$POSTGRES_DB"
    "$bin/pg_ctl" -D "$PGDATA" -m fast -w stop
fi
PATH=$bin:$PATH exec "$@"
EOF
    build "$1" <<EOF
FROM $debian
RUN groupadd -r -g 999 postgres && useradd -r -u 999 -g postgres -d /var/lib/postgresql postgres && \
    $install postgresql locales && $tidy && \
    install -d -o postgres -g postgres /var/lib/postgresql/data && \
    sed -i "s/^#listen_addresses.*/listen_addresses = '*'/" /usr/share/postgresql/*/postgresql.conf.sample
COPY docker-entrypoint.sh /usr/local/bin/
RUN chmod 755 /usr/local/bin/docker-entrypoint.sh && ln -s /usr/lib/postgresql/*/bin/* /usr/local/bin/
ENV PGDATA=/var/lib/postgresql/data LANG=C.UTF-8
VOLUME /var/lib/postgresql/data
STOPSIGNAL SIGINT
ENTRYPOINT ["docker-entrypoint.sh"]
CMD ["postgres"]
EOF
}

redis() {
    build "$1" <<EOF
FROM $debian
RUN groupadd -r -g 999 redis && useradd -r -u 999 -g redis redis && $install redis-server && $tidy && mkdir /data && chown redis /data
WORKDIR /data
CMD ["redis-server", "--protected-mode", "no"]
EOF
}

nginx() {
    build "$1" <<EOF
FROM $debian
RUN groupadd -r -g 101 nginx; useradd -r -u 101 -g 101 nginx; $install nginx-light openssl && $tidy
CMD ["nginx", "-g", "daemon off;"]
STOPSIGNAL SIGQUIT
EOF
}

prometheus() {
    build "$1" <<EOF
FROM $debian
RUN $install prometheus && $tidy && ln -s /usr/bin/prometheus /usr/bin/promtool /bin/ 2>/dev/null; \
    mkdir -p /etc/prometheus /prometheus && chown 65534:65534 /prometheus
ENTRYPOINT ["/usr/bin/prometheus"]
EOF
}

base
for image in "$@"; do
    name=${image%%:*}
    case ${name##*/} in
        python | postgres | redis | nginx | prometheus) "${name##*/}" "$image" ;;
        *) echo "no stand-in for $image: Debian has no such package" >&2 && exit 1 ;;
    esac
    echo "built a stand-in for $image"
done
