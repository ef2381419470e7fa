// SPDX-License-Identifier: GPL-2.0
/* Loaded while a debugger looks: breakpoints in it are set before it is there, also in its __init code. */
#include <linux/module.h>

int kstub_late_answer = 1;
static int factor = 2;
module_param(factor, int, 0444);

static noinline int kstub_late_product(int number)
{
	barrier();
	return number * factor;
}

static int __init kstub_late_init(void)
{
	kstub_late_answer = kstub_late_product(21);
	pr_info("kstub_late: the answer is %d\n", kstub_late_answer);
	return 0;
}

static void __exit kstub_late_exit(void)
{
	kstub_late_answer = 0;
}

module_init(kstub_late_init);
module_exit(kstub_late_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("A module to break in before it is loaded");
