"""Starts training on many devices: the command and environment of each framework's launcher.

    request = Request(backend="torch", processes=8, arguments=("train", "recipe.yaml"))
    build(request, os.environ).shell()     # what would be run, quoted for a shell

No framework is imported here, nor `backends`: it is their launchers that start the workers.
"""

from unillava.launch.command import Launch, Request, build, check, check_recipe
from unillava.launch.slurm import slurm_script
from unillava.launch.start import carry_out

__all__ = ["Launch", "Request", "build", "carry_out", "check", "check_recipe", "slurm_script"]
