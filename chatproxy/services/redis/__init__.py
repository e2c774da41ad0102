"""Several replicas as one service, by way of Redis or Valkey. Imported only where REDIS_URL is set.

The memory of the replica that has asked Grok is the truth; what is in Redis is a copy, written behind it. `commands`
and `subscriptions` are the two connections that a replica has. `copies` writes what this replica's answers consist of,
`mirrors` reads those of others, `directory` finds them, `limits` counts callers, `replicas` puts it together.
"""
