"""The durable queue: key schema, message codec, Lua scripts, producer, lease consumer, embedded server."""
