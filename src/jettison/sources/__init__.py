"""Models, weights and inputs by name, for the command line and for scripts.

Holds: loading a network from `package.module:callable`, timm, torchvision or a `.pt2` file; weights from
safetensors or a `weights_only` state dict; inputs from an image folder, an `.npz` or a callable; and what
`jettison doctor` finds on this machine. Refuses to know: graphs, plans, budgets, and how anything is compressed.
"""
