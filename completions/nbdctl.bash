# SPDX-License-Identifier: MIT
# Loaded at the first Tab behind nbdctl. The function comes from the click that nbdctl runs with, so that they fit.
eval "$(_NBDCTL_COMPLETE=bash_source nbdctl)"
