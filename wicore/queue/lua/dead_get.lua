-- One dead letter.
-- keys: dead
-- args: its id
-- returns: the entry, JSON | nil
-- safe: writes nothing.
return dead_entry(ARGV[1]) or false
