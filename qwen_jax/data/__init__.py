"""From documents on disk to batches on the devices."""
