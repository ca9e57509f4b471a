#!/usr/bin/env bash
# A private S3 server for tests.
#   tests/s3.sh start DIR   starts one with its log in DIR and prints http://127.0.0.1:PORT/BUCKET
#   tests/s3.sh stop DIR    stops it
# PYTHON names a Python that has tests/s3/requirements.txt. Works as root and as an ordinary user.
# Listens on a free loopback port; any credentials are accepted. Objects are in its memory: once
# stopped, it has forgotten everything, so a store that is away and comes back with its objects is
# made by SIGSTOP and SIGCONT (the process is in DIR/pid) or by a proxy in front of it.
#
# The server is moto. What version 5.2.5 was seen to do, by calls of boto3:
#   conditional put   If-None-Match: * on an existing key is 412, on a new one 200; of 16 writers
#                     at once exactly one won, ten times in ten; the same on completing a
#                     multipart upload; a wrong If-Match is 412
#   overwrite         whole: no torn read beside 4 writers of 1 MiB. Writers of one key at the same
#                     moment may get a 500, which clients are to send again
#   multipart         20 MiB in three parts; a part below 5 MiB that is not the last is refused
#                     (EntityTooSmall), no part at all too (MalformedXML); invisible until
#                     completed; an abort is 204, a second one 404 (NoSuchUpload)
#   ranges            first-last and suffix; past the end 416
#   listing           1000 keys a page, 2500 keys in three pages by continuation token
#   deletes           204 whether or not the key is there; many at once too
#   names             blanks, umlauts, + % # ? & = come back as they were
#   speed             about 270 small puts a second; ready one second after its start
set -euo pipefail

bucket=loquetier
python=${PYTHON:-python3}

fail() {
    echo "s3.sh: $*" >&2
    exit 1
}

# Prints the server's address once it says that it listens; the port is of the system's choosing.
await_address() {
    local dir=$1 pid=$2 address
    for _ in $(seq 150); do
        address=$(grep -aoE 'http://127\.0\.0\.1:[0-9]+' "$dir/log" | head -1 || true)
        if [ -n "$address" ]; then
            echo "$address"
            return
        fi
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.2
    done
    cat "$dir/log" >&2
    fail "the server did not start"
}

make_bucket() {
    "$python" - "$1/$bucket" <<'END'
import sys, urllib.request

opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
opener.open(urllib.request.Request(sys.argv[1], method="PUT"), timeout=30).read()
END
}

start() {
    local dir=$1 address pid
    [ ! -e "$dir/pid" ] || fail "$dir holds a server already; stop it first"
    "$python" -c 'import flask, moto.server' 2>/dev/null ||
        fail "$python lacks moto: $python -m pip install -r tests/s3/requirements.txt"
    mkdir -p "$dir"
    env -u AWS_REGION -u AWS_DEFAULT_REGION "$python" -B -c \
        'from moto.server import main; main()' -H 127.0.0.1 -p 0 >"$dir/log" 2>&1 </dev/null &
    pid=$!
    echo "$pid" >"$dir/pid"
    address=$(await_address "$dir" "$pid")
    make_bucket "$address" || fail "the server made no bucket"
    echo "$address/$bucket"
}

stop() {
    local dir=$1 pid
    [ -e "$dir/pid" ] || fail "$dir holds no server"
    pid=$(cat "$dir/pid")
    # A server that a test has stopped with SIGSTOP takes no SIGTERM.
    kill -KILL "$pid" 2>/dev/null || true
    rm -f "$dir/pid" "$dir/log"
    rmdir "$dir" 2>/dev/null || true
}

[ $# -eq 2 ] || fail "usage: $0 start|stop DIR"
dir=$(realpath -m "$2")
case $1 in
    start) start "$dir" ;;
    stop) stop "$dir" ;;
    *) fail "usage: $0 start|stop DIR" ;;
esac
