"""python -m medsa_deploy.cli"""

from . import main

main()
