// SPDX-License-Identifier: GPL-2.0
/*
 * Something in a running kernel to break in and to watch: a thread, alone on the last CPU's list, that adds
 * STEP to a counter every TICK_MS ms; per-CPU values; and in /proc/kstub_live where it all is, as key=value.
 */
#include <linux/delay.h>
#include <linux/kthread.h>
#include <linux/module.h>
#include <linux/percpu.h>
#include <linux/proc_fs.h>
#include <linux/sched.h>
#include <linux/seq_file.h>

#define STEP 3
#define TICK_MS 20

struct kstub_live_state {
	u64 count; /* always a multiple of STEP */
	u64 magic;
};

struct kstub_live_state kstub_live = { .magic = 0x6b737475622d6c76ull /* "kstub-lv" */ };
/* Nobody writes it: a watchpoint here never fires. */
u64 kstub_live_constant = 0x1122334455667788ull;
DEFINE_PER_CPU(u64, kstub_live_percpu);
static struct task_struct *ticker;
static int tick_cpu;

static noinline void kstub_live_tick(u64 step)
{
	WRITE_ONCE(kstub_live.count, kstub_live.count + step);
	barrier(); /* no tail, so that the function has a frame to finish */
}

static int tick(void *unused)
{
	while (!kthread_should_stop()) {
		kstub_live_tick(STEP);
		msleep(TICK_MS);
	}
	return 0;
}

static int show(struct seq_file *file, void *unused)
{
	int cpu;

	seq_printf(file, "tick.pid=%d\ntick.cpu=%d\ntick.step=%d\n", ticker->pid, tick_cpu, STEP);
	seq_printf(file, "tick.task=0x%lx\n", (unsigned long)ticker);
	seq_printf(file, "count.at=0x%lx\ncount=%llu\n", (unsigned long)&kstub_live.count,
		   READ_ONCE(kstub_live.count));
	seq_printf(file, "magic.at=0x%lx\nmagic=0x%llx\n", (unsigned long)&kstub_live.magic, kstub_live.magic);
	seq_printf(file, "constant.at=0x%lx\nconstant=0x%llx\n", (unsigned long)&kstub_live_constant,
		   kstub_live_constant);
	seq_printf(file, "tick.function=0x%lx\n", (unsigned long)kstub_live_tick);
	for_each_online_cpu(cpu)
		seq_printf(file, "percpu.%d.at=0x%lx\npercpu.%d=0x%llx\n", cpu,
			   (unsigned long)per_cpu_ptr(&kstub_live_percpu, cpu), cpu,
			   per_cpu(kstub_live_percpu, cpu));
	seq_printf(file, "init_task=0x%lx\npage_offset=0x%lx\n", (unsigned long)&init_task,
		   PAGE_OFFSET);
	return 0;
}

static int __init kstub_live_init(void)
{
	int cpu;

	for_each_possible_cpu(cpu)
		per_cpu(kstub_live_percpu, cpu) = 0xc0ffee00ull + 0x11 * (cpu + 1);
	tick_cpu = num_online_cpus() - 1;
	ticker = kthread_create(tick, NULL, "kstub-tick");
	if (IS_ERR(ticker))
		return PTR_ERR(ticker);
	kthread_bind(ticker, tick_cpu);
	wake_up_process(ticker);
	proc_create_single("kstub_live", 0444, NULL, show);
	return 0;
}

static void __exit kstub_live_exit(void)
{
	remove_proc_entry("kstub_live", NULL);
	kthread_stop(ticker);
}

module_init(kstub_live_init);
module_exit(kstub_live_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("A counter that a debugger can watch");
