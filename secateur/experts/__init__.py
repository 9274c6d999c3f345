"""Which experts of a mixture stay: functions of what a text showed of the experts of one layer.

Each method is a file of this folder and registers itself under the name that the user types.
"""

from secateur.core.discovery import import_all

import_all(__name__, __path__)
