//! What changes in Redis, each change one script: atomic, and the same when it runs twice.
//!
//! Answers are numbers or lists of texts; the callers beside this file say what they mean.

use std::sync::LazyLock;

use redis::Script;

/// Opens an inbox: the worker's key says which token counts; an earlier inbox is emptied and its
/// reader woken. KEYS workers, worker, inbox stem; ARGV id, token, presence, request bound,
/// control bound, expiry, linger.
pub(super) static OPEN_INBOX: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        "local old = redis.call('HGET', KEYS[2], 'token')
        if old and old ~= ARGV[2] then
            local inbox = KEYS[3] .. old
            redis.call('DEL', inbox .. ':requests', inbox .. ':bodies', inbox .. ':controls',
                inbox .. ':handed')
            redis.call('RPUSH', inbox .. ':bell', '1')
            redis.call('PEXPIRE', inbox .. ':bell', ARGV[7])
        end
        redis.call('HSET', KEYS[2], 'token', ARGV[2], 'presence', ARGV[3],
            'requests', ARGV[4], 'controls', ARGV[5])
        redis.call('PEXPIRE', KEYS[2], ARGV[6])
        redis.call('SADD', KEYS[1], ARGV[1])
        return 1",
    )
});

/// Keeps a worker's presence, or makes it anew where it has run out or was lost. KEYS and ARGV as
/// [`OPEN_INBOX`]. 0: another inbox has this id.
pub(super) static KEEP_WORKER: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        "local token = redis.call('HGET', KEYS[2], 'token')
        if token and token ~= ARGV[2] then return 0 end
        redis.call('HSET', KEYS[2], 'token', ARGV[2], 'presence', ARGV[3],
            'requests', ARGV[4], 'controls', ARGV[5])
        redis.call('PEXPIRE', KEYS[2], ARGV[6])
        redis.call('SADD', KEYS[1], ARGV[1])
        local inbox = KEYS[3] .. ARGV[2]
        for _, part in ipairs({':requests', ':bodies', ':controls', ':handed', ':bell'}) do
            redis.call('PEXPIRE', inbox .. part, ARGV[7])
        end
        return 1",
    )
});

/// Ends an inbox, and the worker's presence if it is this inbox's. KEYS as [`OPEN_INBOX`]; ARGV
/// id, token.
pub(super) static CLOSE_INBOX: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        "local inbox = KEYS[3] .. ARGV[2]
        redis.call('DEL', inbox .. ':requests', inbox .. ':bodies', inbox .. ':controls',
            inbox .. ':handed', inbox .. ':bell')
        if redis.call('HGET', KEYS[2], 'token') == ARGV[2] then
            redis.call('DEL', KEYS[2])
            redis.call('SREM', KEYS[1], ARGV[1])
        end
        return 1",
    )
});

/// Puts a request into an inbox. KEYS worker, inbox stem; ARGV `ATTEMPT:REQUEST`, envelope,
/// linger, seen. 0: no such worker; 1: in; 2: full.
pub(super) static PLACE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        "local worker = redis.call('HMGET', KEYS[1], 'token', 'requests')
        if not worker[1] then return 0 end
        local inbox = KEYS[2] .. worker[1]
        local seen = inbox .. ':seen:' .. ARGV[1]
        if redis.call('EXISTS', seen) == 1 then return 1 end
        local requests, bell = inbox .. ':requests', inbox .. ':bell'
        if redis.call('LLEN', requests) >= tonumber(worker[2]) then return 2 end
        redis.call('SET', seen, '1', 'PX', ARGV[4])
        redis.call('RPUSH', requests, ARGV[1])
        redis.call('PEXPIRE', requests, ARGV[3])
        redis.call('HSET', inbox .. ':bodies', ARGV[1], ARGV[2])
        redis.call('PEXPIRE', inbox .. ':bodies', ARGV[3])
        if redis.call('EXISTS', bell) == 0 then redis.call('RPUSH', bell, '1') end
        redis.call('PEXPIRE', bell, ARGV[3])
        return 1",
    )
});

/// Puts a control message into an inbox, once; a cancel first looks for its request among those
/// that wait. KEYS worker, inbox stem; ARGV envelope, request to cancel or nothing, linger, the
/// last of its attempts to cancel. 0: no such worker; 1: sent; 2: no room.
pub(super) static CONTROL: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        "local worker = redis.call('HMGET', KEYS[1], 'token', 'controls')
        if not worker[1] then return 0 end
        local inbox = KEYS[2] .. worker[1]
        local removed = 0
        if ARGV[2] ~= '' then
            local requests = inbox .. ':requests'
            for _, entry in ipairs(redis.call('LRANGE', requests, 0, -1)) do
                local colon = string.find(entry, ':', 1, true)
                if string.sub(entry, colon + 1) == ARGV[2]
                    and tonumber(string.sub(entry, 1, colon - 1)) <= tonumber(ARGV[4]) then
                    redis.call('LREM', requests, 1, entry)
                    redis.call('HDEL', inbox .. ':bodies', entry)
                    removed = removed + 1
                end
            end
        end
        if removed > 0 then return 1 end
        local controls, bell = inbox .. ':controls', inbox .. ':bell'
        if redis.call('LPOS', controls, ARGV[1]) then return 1 end
        if redis.call('LLEN', controls) >= tonumber(worker[2]) then return 2 end
        redis.call('RPUSH', controls, ARGV[1])
        redis.call('PEXPIRE', controls, ARGV[3])
        if redis.call('EXISTS', bell) == 0 then redis.call('RPUSH', bell, '1') end
        redis.call('PEXPIRE', bell, ARGV[3])
        return 1",
    )
});

/// Takes the next of an inbox, control before requests; asked again with the same number, it
/// gives the same again. KEYS worker, inbox stem; ARGV token, number, linger. An empty list:
/// another inbox has this id; else kind (`c`, `r`, or nothing waits) and envelope.
pub(super) static TAKE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        "local token = redis.call('HGET', KEYS[1], 'token')
        if token and token ~= ARGV[1] then return {} end
        local inbox = KEYS[2] .. ARGV[1]
        local handed = redis.call('HMGET', inbox .. ':handed', 'number', 'kind', 'body')
        if handed[1] == ARGV[2] then return {handed[2], handed[3]} end
        local kind, body = 'c', redis.call('LPOP', inbox .. ':controls')
        while not body do
            local entry = redis.call('LPOP', inbox .. ':requests')
            if not entry then return {'', ''} end
            kind, body = 'r', redis.call('HGET', inbox .. ':bodies', entry)
            redis.call('HDEL', inbox .. ':bodies', entry)
        end
        redis.call('HSET', inbox .. ':handed', 'number', ARGV[2], 'kind', kind, 'body', body)
        redis.call('PEXPIRE', inbox .. ':handed', ARGV[3])
        return {kind, body}",
    )
});

/// The presences of the workers alive. KEYS workers; ARGV worker stem.
pub(super) static WORKERS: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        "local alive = {}
        for _, id in ipairs(redis.call('SMEMBERS', KEYS[1])) do
            local presence = redis.call('HGET', ARGV[1] .. id, 'presence')
            if presence then table.insert(alive, presence)
            else redis.call('SREM', KEYS[1], id) end
        end
        return alive",
    )
});

/// The ids alive of a set. KEYS workers or gateways; ARGV the stem of its ids' keys.
pub(super) static ALIVE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        "local alive = {}
        for _, id in ipairs(redis.call('SMEMBERS', KEYS[1])) do
            if redis.call('EXISTS', ARGV[1] .. id) == 1 then table.insert(alive, id)
            else redis.call('SREM', KEYS[1], id) end
        end
        return alive",
    )
});

/// Opens a gateway's stream; the reader of an earlier one finds its end. KEYS gateways, gateway,
/// tokens stem; ARGV id, token, bound, expiry, linger.
pub(super) static OPEN_TOKENS: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        "local old = redis.call('HGET', KEYS[2], 'token')
        if old and old ~= ARGV[2] then
            redis.call('XADD', KEYS[3] .. old, '*', 'end', '1')
            redis.call('PEXPIRE', KEYS[3] .. old, ARGV[5])
        end
        redis.call('HSET', KEYS[2], 'token', ARGV[2], 'messages', ARGV[3])
        redis.call('PEXPIRE', KEYS[2], ARGV[4])
        redis.call('SADD', KEYS[1], ARGV[1])
        return 1",
    )
});

/// Keeps a gateway's presence. Where it has run out or was lost, messages may have been lost with
/// it: a new stream is opened. KEYS as [`OPEN_TOKENS`]; ARGV the same, then the token of a new
/// stream. 0: another receiver has this id; 1: kept; 2: the new stream counts.
pub(super) static KEEP_GATEWAY: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        "local token = redis.call('HGET', KEYS[2], 'token')
        if token and token ~= ARGV[2] and token ~= ARGV[6] then return 0 end
        local answer = 2
        if token == ARGV[2] then answer = 1 end
        if not token then
            redis.call('HSET', KEYS[2], 'token', ARGV[6], 'messages', ARGV[3])
            redis.call('DEL', KEYS[3] .. ARGV[2])
        end
        redis.call('PEXPIRE', KEYS[2], ARGV[4])
        redis.call('PEXPIRE', KEYS[3] .. ARGV[2], ARGV[5])
        redis.call('SADD', KEYS[1], ARGV[1])
        return answer",
    )
});

/// Ends a stream, and the gateway's presence if it is this stream's. KEYS as [`OPEN_TOKENS`]; ARGV
/// id, token.
pub(super) static CLOSE_TOKENS: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        "redis.call('DEL', KEYS[3] .. ARGV[2])
        if redis.call('HGET', KEYS[2], 'token') == ARGV[2] then
            redis.call('DEL', KEYS[2])
            redis.call('SREM', KEYS[1], ARGV[1])
        end
        return 1",
    )
});

/// Appends a token message. KEYS gateway, tokens stem; ARGV envelope, linger. 0: no such gateway;
/// 1: appended; 2: no room. (Twice is no harm: a gateway drops a sequence number it has had.)
pub(super) static PUBLISH: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        "local gateway = redis.call('HMGET', KEYS[1], 'token', 'messages')
        if not gateway[1] then return 0 end
        local stream = KEYS[2] .. gateway[1]
        if redis.call('XLEN', stream) >= tonumber(gateway[2]) then return 2 end
        redis.call('XADD', stream, '*', 'm', ARGV[1])
        redis.call('PEXPIRE', stream, ARGV[2])
        return 1",
    )
});

/// Frees the room of messages read. KEYS stream; ARGV the least id to keep.
pub(super) static TRIM: LazyLock<Script> =
    LazyLock::new(|| Script::new("return redis.call('XTRIM', KEYS[1], 'MINID', ARGV[1])"));
