-- Take one request from a client's bucket, for a call that is no job.
-- keys: bucket:{client}
-- args: client, limits as JSON
-- returns: {'spent', levels} | {'limited', what is short, its limit, ms until there is room, levels}
-- safe: a repeat takes another one.
local client, limits = ARGV[1], cjson.decode(ARGV[2])
return spend(client, limits, 0, false) or {'spent', levels_of(client, limits)}
