-- One line for each key that should not be there while nothing is under way. What belonged to the
-- dead may wait for its expiry; what belongs to the living must be empty.
local found = {}

local function alive(kind, id, token)
    return redis.call('HGET', 'loquetier:' .. kind .. ':' .. id, 'token') == token
end

for _, key in ipairs(redis.call('KEYS', '*')) do
    local lasting = redis.call('PTTL', key) == -1
    local id, token, part = string.match(key, '^loquetier:inbox:([^:]+):([^:]+):(%a+)')
    if part == 'requests' or part == 'bodies' or part == 'controls' then
        if lasting or alive('worker', id, token) then
            table.insert(found, 'an entry of an inbox: ' .. key)
        end
    end
    id, token = string.match(key, '^loquetier:tokens:([^:]+):([^:]+)$')
    if id and (lasting or alive('gateway', id, token)) and redis.call('XLEN', key) > 0 then
        table.insert(found, 'token messages: ' .. key .. ', ' .. redis.call('XLEN', key))
    end
    if lasting and key ~= 'loquetier:workers' and key ~= 'loquetier:gateways' then
        table.insert(found, 'a key for ever: ' .. key)
    end
end
return found
