"""Programs that run one engine each, in whatever interpreter has it. See `protocol`."""
