"""The demo in the switch form: a client, a switch, and two hosts that protect each other's VMs; one of them dies."""
