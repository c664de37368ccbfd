"""Run several processes as one job: collectives, launch, signals, stop requests, cores."""
