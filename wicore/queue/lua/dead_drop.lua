-- Remove one dead letter.
-- keys: dead
-- args: its id
-- returns: 1, removed | 0, there was none
-- safe: ids are never used twice, so a repeat finds nothing.
local entry = dead_entry(ARGV[1])
return entry and redis.call('LREM', K.dead, 1, entry) or 0
