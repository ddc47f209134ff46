"""The colours of all plots: Okabe and Ito's (jfly.uni-koeln.de/color), which colour-blind readers tell apart."""

BLACK = "#000000"
BLUE = "#0072B2"
GREEN = "#009E73"
GREY = "#999999"
ORANGE = "#E69F00"
PURPLE = "#CC79A7"
SKY_BLUE = "#56B4E9"
VERMILION = "#D55E00"
YELLOW = "#F0E442"

# Further lines of a crowded figure, and the background
OLIVE, VIOLET = "#B2A300", "#7F3C8D"
DARK_GREY, MIDDLE_GREY, LIGHT_GREY, GRID = "#555555", "#777777", "#BBBBBB", "#888888"

# One for each condition of a table's figure
CLEAN, FGSM, PGD, UNION = "#8a94a6", "#2563eb", "#d97706", "#b91c1c"
