"""Selected attention: kernels of the forward and of the backward pass, and of their lists."""

from nki_kernels.selected_attention.backward import backward as backward
from nki_kernels.selected_attention.backward import backward_sum as backward_sum
from nki_kernels.selected_attention.forward import forward as forward
from nki_kernels.selected_attention.lists import union_lists as union_lists
