"""The signal-to-noise ratio of second moments: measure, record, monitor."""
