"""Runs as SLURM jobs: options, checks, submission through submitit, what happens inside the job, following it."""
