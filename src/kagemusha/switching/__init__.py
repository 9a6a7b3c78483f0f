"""The connection between hosts and their switch: the switch's server, and the clients on the hosts.

``protocol.switch`` and ``protocol.switch_host`` decide; ``wire.switch`` has the bytes. Does not touch frames: what
holds them and lets them go is handed in (``plane.VmGate``).
"""
