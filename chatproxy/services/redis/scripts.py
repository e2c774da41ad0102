"""What has to happen in Redis in one step, in its language (Lua), and the names of keys.

All keys begin with the prefix and have a time to live. Nothing that anybody said, and nobody's address, is in a key's
name: what a client chooses becomes a keyed digest. `{id}` keeps the keys of one answer together.
"""

import hashlib
from typing import Any

from chatproxy.config import Settings


class Keys:
    """Names of keys and channels. `owner` is this replica, by a name that no other start of it had."""

    def __init__(self, settings: Settings, owner: str) -> None:
        self.owner = owner
        self.prefix = settings.redis_prefix
        self.retry_after = f"{self.prefix}retry-after"
        self.loss_marker = f"{self.prefix}memory-lost"
        self.own_lease = self.lease(owner)
        # All replicas have it, and whoever reads Redis does not.
        self._secret = hashlib.sha256((settings.grok_api_key or "").encode()).digest()

    def digest(self, *parts: str | bytes) -> str:
        """What stands for a client's words."""
        digest = hashlib.blake2b(digest_size=16, key=self._secret)
        for part in parts:
            data = part.encode() if isinstance(part, str) else part
            digest.update(len(data).to_bytes(8) + data)
        return digest.hexdigest()

    def meta(self, id: str) -> str:
        return f"{self.prefix}{{{id}}}:meta"

    def events(self, id: str) -> str:
        return f"{self.prefix}{{{id}}}:events"

    def stop(self, id: str) -> str:
        return f"{self.prefix}{{{id}}}:stop"

    def channel(self, id: str) -> str:
        return f"{self.prefix}{{{id}}}"

    def lease(self, owner: str) -> str:
        """Also the channel on which that replica is told things."""
        return f"{self.prefix}replica:{owner}"

    def idempotency(self, scope: str, key: str) -> str:
        return f"{self.prefix}key:{self.digest(scope, key)}"

    def name(self, name: str) -> str:
        return f"{self.prefix}name:{self.digest(name)}"

    def rate(self, caller: str) -> str:
        return f"{self.prefix}rate:{self.digest(caller)}"

    def used(self, caller: str) -> str:
        """Tokens; of all callers for the empty name."""
        return f"{self.prefix}tokens:{self.digest(caller)}:used"

    def reserved(self, caller: str) -> str:
        return f"{self.prefix}tokens:{self.digest(caller)}:reserved"

    def running(self, caller: str) -> str:
        return f"{self.prefix}open:{self.digest(caller)}"


class Script:
    """One script; `script(keys, arguments)` is the command that runs it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    def __call__(self, keys: list[str], *arguments: Any) -> tuple[Any, ...]:
        return ("EVALSHA", self.sha, len(keys), *keys, *arguments)


# Where an answer has no idempotency key or no name, its meta key stands in that place: a user may have no
# right to any key that is not under the prefix.

# KEYS: meta, the idempotency key, the name. ARGV: prefix, id, owner, milliseconds to live, then fields and
# values of meta. Gives the id of the answer that has the key already, or nil: then all is written. The key is free
# where its answer is gone or was refused, and where its replica died before it had a status.
CLAIM = Script("""
local prefix, id, owner, ttl = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
if KEYS[2] ~= KEYS[1] then
  local first = redis.pcall('GET', KEYS[2])
  if type(first) == 'string' and first ~= id then
    local known = redis.pcall('HMGET', prefix .. '{' .. first .. '}:meta', 'state', 'owner')
    if known[1] and known[2] and known[1] ~= 'refused' and
       (known[1] ~= 'asking' or redis.call('EXISTS', prefix .. 'replica:' .. known[2]) == 1) then return first end
  end
  redis.call('SET', KEYS[2], id, 'PX', ttl)
end
if KEYS[3] ~= KEYS[1] then redis.call('SET', KEYS[3], id, 'PX', ttl) end
redis.call('HSET', KEYS[1], unpack(ARGV, 5))
redis.call('PEXPIRE', KEYS[1], ttl)
return false
""")

# KEYS: meta, key, name, channel. ARGV: id, owner, what was refused. Nothing is left but why, for 5 s.
RELEASE = Script("""
for i = 2, 3 do
  if KEYS[i] ~= KEYS[1] and redis.call('GET', KEYS[i]) == ARGV[1] then redis.call('DEL', KEYS[i]) end
end
if redis.call('HGET', KEYS[1], 'owner') == ARGV[2] then
  redis.call('HSET', KEYS[1], 'state', 'refused', 'error', ARGV[3])
  redis.call('PEXPIRE', KEYS[1], 5000)
  redis.call('PUBLISH', KEYS[4], '')
end
""")

# KEYS: meta, events, channel, key, name. ARGV: id, owner, state, the entry's id or "", its content, what is
# published of it, milliseconds to live or 0 (as it is), the id of the oldest entry to keep or "", then fields of meta
# that are written where it is gone. Gives -1 where the answer is not this replica's any more: it expired, or another
# one has told its end. Else how many replicas read along.
WRITE = Script("""
local id, owner, state, entry, ttl = ARGV[1], ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[7])
if ARGV[9] and redis.call('EXISTS', KEYS[1]) == 0 then
  redis.call('HSET', KEYS[1], unpack(ARGV, 9))
  for i = 4, 5 do
    if KEYS[i] ~= KEYS[1] then redis.call('SET', KEYS[i], id, 'PX', ttl, 'NX') end
  end
end
local known = redis.call('HMGET', KEYS[1], 'owner', 'state')
if known[1] ~= owner or known[2] == 'ended' then return -1 end
if entry ~= '' then redis.call('XADD', KEYS[2], entry, 'f', ARGV[5]) end
if known[2] ~= state then redis.call('HSET', KEYS[1], 'state', state) end
if ARGV[8] ~= '' then redis.call('XTRIM', KEYS[2], 'MINID', ARGV[8]) end
if ttl > 0 then
  redis.call('PEXPIRE', KEYS[1], ttl)
  redis.call('PEXPIRE', KEYS[2], ttl)
  for i = 4, 5 do
    if KEYS[i] ~= KEYS[1] and redis.call('GET', KEYS[i]) == id then redis.call('PEXPIRE', KEYS[i], ttl) end
  end
elseif redis.call('PTTL', KEYS[2]) == -1 then
  redis.call('PEXPIRE', KEYS[2], redis.call('PTTL', KEYS[1]))
end
return redis.call('PUBLISH', KEYS[3], ARGV[6])
""")

# KEYS: meta, events, channel. ARGV: owner, content, milliseconds to live. The end of an answer whose owner is dead:
# once, and only if it has told none itself.
END_FOR_DEAD = Script("""
local known = redis.call('HMGET', KEYS[1], 'owner', 'state')
if known[1] ~= ARGV[1] or known[2] == 'ended' then return 0 end
redis.call('XADD', KEYS[2], '1-0', 'f', ARGV[2])
redis.call('HSET', KEYS[1], 'state', 'ended')
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
redis.call('PUBLISH', KEYS[3], ARGV[2])
return 1
""")

# KEYS: meta. Somebody has read the answer to its end.
NOTE_READ = Script("""
if redis.call('EXISTS', KEYS[1]) == 1 then redis.call('HSET', KEYS[1], 'read', '1') end
""")

# KEYS: the caller's window. ARGV: how many to count, the limit, milliseconds. Gives how many were counted before, and
# how many milliseconds are left. Nothing is counted beyond the limit.
RATE = Script("""
local used = tonumber(redis.call('GET', KEYS[1]) or '0')
local left = redis.call('PTTL', KEYS[1])
if left < 0 then left = tonumber(ARGV[3]) end
if tonumber(ARGV[1]) > 0 and used < tonumber(ARGV[2]) then
  redis.call('SET', KEYS[1], used + ARGV[1], 'PX', left)
end
return {used, left}
""")

# KEYS: the caller's running answers, by replica. ARGV: prefix, own replica, its count with the new one, the limit,
# milliseconds to live. What dead replicas have left does not count. Gives 1 if it may run, and notes the count then.
RESERVE = Script("""
local others, counts = 0, redis.call('HGETALL', KEYS[1])
for i = 1, #counts, 2 do
  if counts[i] ~= ARGV[2] then
    if redis.call('EXISTS', ARGV[1] .. 'replica:' .. counts[i]) == 1 then others = others + tonumber(counts[i + 1])
    else redis.call('HDEL', KEYS[1], counts[i]) end
  end
end
if others + tonumber(ARGV[3]) > tonumber(ARGV[4]) then return 0 end
redis.call('HSET', KEYS[1], ARGV[2], ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[5])
return 1
""")

# KEYS: of each budget, what is used, and what is reserved by replica (and the number of each replica's last booking).
# ARGV: prefix, own replica, tokens, milliseconds to live of what is reserved, milliseconds of a lease, and 1 if a
# replica without a lease is dead; then of each budget its limit, the milliseconds of its window, and what this replica
# has reserved with the new tokens. Gives of each what is used, what was reserved before, and the milliseconds that are
# left. Reserves where each budget has enough left, or has nothing reserved. What dead replicas have reserved counts as
# used. This replica is alive: where its lease has run out, it gets one, or another replica would book what it reserves.
RESERVE_TOKENS = Script("""
local prefix, owner, tokens, ttl = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
redis.call('SET', prefix .. 'replica:' .. owner, '1', 'PX', ARGV[5], 'NX')
local found, allowed = {}, true
for i = 1, #KEYS / 2 do
  local used_key, reserved_key = KEYS[2 * i - 1], KEYS[2 * i]
  local limit, window, own = tonumber(ARGV[3 * i + 4]), ARGV[3 * i + 5], tonumber(ARGV[3 * i + 6])
  redis.call('SET', used_key, '0', 'PX', window, 'NX')
  local reserved, replicas = own - tokens, redis.call('HGETALL', reserved_key)
  for j = 1, #replicas, 2 do
    local replica = replicas[j]
    if replica ~= owner and string.sub(replica, 1, 1) ~= '#' then
      if ARGV[6] ~= '1' or redis.call('EXISTS', prefix .. 'replica:' .. replica) == 1 then
        reserved = reserved + tonumber(replicas[j + 1])
      else
        redis.call('INCRBY', used_key, replicas[j + 1])
        redis.call('HDEL', reserved_key, replica, '#' .. replica)
      end
    end
  end
  local used = tonumber(redis.call('GET', used_key))
  allowed = allowed and used < limit and (reserved == 0 or used + reserved + tokens <= limit)
  found[i] = {used, reserved, redis.call('PTTL', used_key)}
end
if allowed then
  for i = 1, #KEYS / 2 do
    redis.call('HSET', KEYS[2 * i], owner, ARGV[3 * i + 6])
    redis.call('PEXPIRE', KEYS[2 * i], ttl)
  end
end
return found
""")

# KEYS: what is used, what is reserved. ARGV: own replica, the number of this booking, tokens, what this replica has
# reserved, the milliseconds of the window, milliseconds to live of what is reserved. Gives what is used, what is
# reserved, and the milliseconds that are left.
BOOK = Script("""
local owner, number = ARGV[1], tonumber(ARGV[2])
redis.call('SET', KEYS[1], '0', 'PX', ARGV[5], 'NX')
if tonumber(redis.call('HGET', KEYS[2], '#' .. owner) or '0') < number then
  redis.call('INCRBY', KEYS[1], ARGV[3])
  redis.call('HSET', KEYS[2], '#' .. owner, number)
end
redis.call('HSET', KEYS[2], owner, ARGV[4])
redis.call('PEXPIRE', KEYS[2], ARGV[6])
local reserved, replicas = 0, redis.call('HGETALL', KEYS[2])
for j = 1, #replicas, 2 do
  if string.sub(replicas[j], 1, 1) ~= '#' then reserved = reserved + tonumber(replicas[j + 1]) end
end
return {tonumber(redis.call('GET', KEYS[1])), reserved, redis.call('PTTL', KEYS[1])}
""")

# KEYS: the remembered Retry-After. ARGV: milliseconds. The longest wins.
RETRY_AFTER = Script("""
if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[1]) then redis.call('SET', KEYS[1], '1', 'PX', ARGV[1]) end
""")

SCRIPTS = (CLAIM, RELEASE, WRITE, END_FOR_DEAD, NOTE_READ, RATE, RESERVE, RESERVE_TOKENS, BOOK, RETRY_AFTER)
