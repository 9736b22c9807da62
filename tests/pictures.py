"""Whether a file is a picture that shows something."""

import matplotlib.image


def is_picture(path):
    pixels = matplotlib.image.imread(path)
    return pixels.shape[0] > 200 and pixels.shape[1] > 400 and pixels.std() > 0.02
