"""Calibration against full training runs: how plans chosen early compare with plans chosen late."""
