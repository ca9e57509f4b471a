#!/usr/bin/env bash
# A private Postgres for tests.
#   tests/postgres.sh start DIR   starts one with its data in DIR and prints its URL
#   tests/postgres.sh stop DIR    stops it and removes its data
#   tests/postgres.sh kill DIR    kills it; what was committed stays
#   tests/postgres.sh again DIR   starts a killed one again, at the same URL
# Works as root (the server then runs as the user `postgres`, who must be able to reach DIR) and as
# an ordinary user. Listens on a free loopback port, with a password nobody else knows; nothing is
# flushed to disk, so it is fast, outlives its own death, and not that of the machine.
set -euo pipefail

fail() {
    echo "postgres.sh: $*" >&2
    exit 1
}

# Prints the folder of the server's programs: the newest Debian installation, or what PATH has.
find_programs() {
    local folder
    folder=$(ls -d /usr/lib/postgresql/*/bin 2>/dev/null | sort -V | tail -1 || true)
    if [ -n "$folder" ] && [ -x "$folder/initdb" ]; then
        echo "$folder"
    elif command -v initdb >/dev/null; then
        dirname "$(command -v initdb)"
    else
        fail "no Postgres server found; install one (Debian: apt-get install postgresql)"
    fi
}

# Runs a command as the user the server runs as: Postgres refuses to be root.
as_owner() {
    if [ "$(id -u)" -eq 0 ]; then
        (cd / && runuser -u postgres -- "$@")
    else
        "$@"
    fi
}

prepare() {
    local dir=$1 programs=$2 password=$3
    mkdir -p "$dir"
    if [ "$(id -u)" -eq 0 ]; then
        chown postgres "$dir"
        as_owner test -w "$dir" || fail "the user postgres cannot reach $dir; choose another"
    fi
    echo "$password" | as_owner tee "$dir/password" >/dev/null
    as_owner chmod 600 "$dir/password"
    as_owner "$programs/initdb" --pgdata "$dir/data" --username loquetier \
        --pwfile "$dir/password" --auth scram-sha-256 --encoding UTF8 --no-locale --no-sync \
        >"$dir.initdb.log" 2>&1 || {
        cat "$dir.initdb.log" >&2
        fail "initdb failed"
    }
    rm -f "$dir.initdb.log"
}

start() {
    local dir=$1 programs password port
    programs=$(find_programs)
    [ ! -e "$dir/data" ] || fail "$dir holds a server already; stop it first"
    password=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
    prepare "$dir" "$programs" "$password"
    # A port is known to be free only once the server has it: try a few.
    for _ in 1 2 3 4 5 6 7 8; do
        port=$((20000 + RANDOM % 12000))
        if as_owner "$programs/pg_ctl" --pgdata "$dir/data" --log "$dir/log" --silent --wait \
            --options "-c listen_addresses=127.0.0.1 -c port=$port \
                -c unix_socket_directories='$dir' -c max_connections=300 -c shared_buffers=64MB \
                -c fsync=off -c full_page_writes=off" \
            start >/dev/null 2>&1; then
            echo "postgres://loquetier:$password@127.0.0.1:$port/postgres"
            return
        fi
    done
    cat "$dir/log" >&2
    fail "the server did not start"
}

stop() {
    local dir=$1 programs
    programs=$(find_programs)
    [ -e "$dir/data" ] || fail "$dir holds no server"
    as_owner "$programs/pg_ctl" --pgdata "$dir/data" --silent --wait --mode immediate stop || true
    rm -rf "$dir/data" "$dir/log" "$dir/password"
    rmdir "$dir" 2>/dev/null || true
}

kill_server() {
    local dir=$1
    as_owner "$(find_programs)/pg_ctl" --pgdata "$dir/data" --silent --wait --mode immediate stop
}

again() {
    local dir=$1
    # Restarting takes the options of the last start.
    as_owner "$(find_programs)/pg_ctl" --pgdata "$dir/data" --log "$dir/log" --silent --wait \
        restart >/dev/null 2>&1 || {
        cat "$dir/log" >&2
        fail "the server did not start again"
    }
}

usage="usage: $0 start|stop|kill|again DIR"
[ $# -eq 2 ] || fail "$usage"
dir=$(realpath -m "$2")
case $1 in
    start) start "$dir" ;;
    stop) stop "$dir" ;;
    kill) kill_server "$dir" ;;
    again) again "$dir" ;;
    *) fail "$usage" ;;
esac
