#!/usr/bin/env bash
# A private Redis for tests.
#   tests/redis.sh start DIR   starts one with its files in DIR and prints its URL
#   tests/redis.sh stop DIR    stops it and removes its files
# Works as root and as an ordinary user. Listens only on a Unix socket in DIR that nobody else may
# open; keeps nothing on disk.
set -euo pipefail

fail() {
    echo "redis.sh: $*" >&2
    exit 1
}

start() {
    local dir=$1 server
    server=$(command -v redis-server) ||
        fail "no Redis server found; install one (Debian: apt-get install redis-server)"
    [ ! -e "$dir/pid" ] || fail "$dir holds a server already; stop it first"
    [ ${#dir} -le 90 ] || fail "$dir is too long a name for a folder with a socket"
    mkdir -p "$dir"
    # An empty file of settings: the ones of the system do not apply.
    "$server" - --port 0 --unixsocket "$dir/socket" --unixsocketperm 700 --save '' \
        --appendonly no --dir "$dir" --daemonize yes --pidfile "$dir/pid" --logfile "$dir/log" \
        </dev/null >/dev/null
    for _ in $(seq 100); do
        if [ -s "$dir/pid" ] && [ -S "$dir/socket" ]; then
            echo "redis+unix://$dir/socket"
            return
        fi
        sleep 0.1
    done
    cat "$dir/log" >&2 || true
    fail "the server did not start"
}

stop() {
    local dir=$1 pid
    [ -e "$dir/pid" ] || fail "$dir holds no server"
    pid=$(cat "$dir/pid")
    # TERM waits for no client; a server that is stopped or stuck is killed.
    kill "$pid" 2>/dev/null || true
    for _ in $(seq 50); do
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.1
    done
    kill -KILL "$pid" 2>/dev/null || true
    rm -f "$dir/pid" "$dir/socket" "$dir/log"
    rmdir "$dir" 2>/dev/null || true
}

[ $# -eq 2 ] || fail "usage: $0 start|stop DIR"
dir=$(realpath -m "$2")
case $1 in
    start) start "$dir" ;;
    stop) stop "$dir" ;;
    *) fail "usage: $0 start|stop DIR" ;;
esac
