"""The flow monitor: detectors read copies of a VM's frames and say which flows may be sent ahead of their commit."""
