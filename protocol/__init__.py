"""What crosses a process boundary: messages, codec, prefix hashes, errors, and the Trio-ZeroMQ link.

Imports nothing of ours and never torch. `protocol.link` needs trio and is imported only by those who run one.
"""

PROTOCOL_VERSION = 3
