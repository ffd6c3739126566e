# SPDX-License-Identifier: MIT
# Loaded at the first Tab behind nbdctl. The function comes from the click that nbdctl runs with, so that they fit.
_NBDCTL_COMPLETE=fish_source nbdctl | source
