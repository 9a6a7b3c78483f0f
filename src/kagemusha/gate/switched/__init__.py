"""The gate of a network switch: the same classifier and hold buffer as on a host, one for each protected VM."""
