"""Measure what layers of pruned models cost on this machine, into a profile: `hwprune profile`, as a script.

python scripts/profile_device.py --minutes 20                    # writes DEVICE.json, here
python scripts/profile_device.py --device cpu --threads 1 --out profiles/my-cpu.json
"""

import sys

from hwprune.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "profile")  # there, as the profile records how it was made
    main()
