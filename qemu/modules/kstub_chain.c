// SPDX-License-Identifier: GPL-2.0
/*
 * Ends the guest in a way that is hard to unwind, chosen by how=:
 *
 *   nmi       panic in an NMI, in a hard interrupt, in a softirq, in a task
 *   irq       an invalid access in a hard interrupt
 *   fault     an invalid access in a task
 *   kprobe    panic in a kprobe, below a function with a kretprobe
 *   graph     panic below functions that the function graph tracer traces; waits for go=1
 *   bpf       panic in a kprobe, in a helper of the BPF program that qemu/programs/bpf-filter.c runs
 *   nested    panic in an NMI that came while another was handled
 *   overflow  the stack runs into its guard page
 *   locks     no panic: CPUs 4 and 5 spin for a spinlock, CPU 3 for a bit lock
 *
 * Every function on the way has its own name and cannot be inlined, and the log
 * says before the end which they are, innermost first.
 */
#include <linux/delay.h>
#include <linux/interrupt.h>
#include <linux/irq_work.h>
#include <linux/kernel.h>
#include <linux/kprobes.h>
#include <linux/kthread.h>
#include <linux/module.h>
#include <linux/nmi.h>
#include <linux/spinlock.h>
#include <linux/uaccess.h>
#include <asm/apic.h>
#include <asm/nmi.h>
#include <asm/processor.h>
#include <linux/bit_spinlock.h>

#define NOWHERE ((volatile int *)0xffffffff00000100ul)
#define BIT_LOCK_CPU 3
#define FIRST_SPINLOCK_CPU 4
#define SPINLOCK_CPUS 2

static char *how = "nmi";
module_param(how, charp, 0444);

/* Neither inlined nor cloned under another name. */
#define ALONE noinline __attribute__((noipa))

/* What a call leaves to its caller: without it the call would be a jump and the frame gone. */
static int returned;
#define AFTER_CALL() (returned++)

static void expect(const char *frames)
{
	pr_info("kstub_chain: how=%s\n", how);
	pr_info("kstub_chain: frames=%s\n", frames);
}

/* nmi, irq */

static bool fault_in_interrupt;

static ALONE void kstub_invalid_access(void)
{
	*NOWHERE = 1;
	AFTER_CALL();
}

static ALONE int kstub_in_nmi(unsigned int type, struct pt_regs *regs)
{
	nmi_panic(regs, "kstub_chain: in an NMI");
	AFTER_CALL();
	return NMI_HANDLED;
}

static ALONE void kstub_in_hardirq(struct irq_work *unused)
{
	if (fault_in_interrupt)
		kstub_invalid_access();
	else
		apic->send_IPI(smp_processor_id(), NMI_VECTOR);
	mdelay(1000);
	AFTER_CALL();
}

static struct irq_work interrupt_work;

static ALONE void kstub_in_softirq(struct tasklet_struct *unused)
{
	irq_work_queue(&interrupt_work);
	mdelay(1000);
	AFTER_CALL();
}

static DECLARE_TASKLET(softirq_work, kstub_in_softirq);

static ALONE void kstub_task_inner(void)
{
	local_bh_disable();
	tasklet_schedule(&softirq_work);
	local_bh_enable();
	AFTER_CALL();
}

static ALONE int kstub_task_outer(void *unused)
{
	kstub_task_inner();
	AFTER_CALL();
	return 0;
}

static int chain(void)
{
	init_irq_work(&interrupt_work, kstub_in_hardirq);
	if (!fault_in_interrupt)
		register_nmi_handler(NMI_LOCAL, kstub_in_nmi, NMI_FLAG_FIRST, "kstub_chain");
	expect(fault_in_interrupt ?
		       "kstub_invalid_access,kstub_in_hardirq,kstub_in_softirq,kstub_task_inner,kstub_task_outer" :
		       "kstub_in_nmi,kstub_in_hardirq,kstub_in_softirq,kstub_task_inner,kstub_task_outer");
	return kstub_task_outer(NULL);
}

/* fault */

static ALONE void kstub_fault_inner(int depth)
{
	if (depth)
		kstub_fault_inner(depth - 1);
	else
		kstub_invalid_access();
	AFTER_CALL();
}

static int fault(void)
{
	expect("kstub_invalid_access,kstub_fault_inner,kstub_fault_inner,kstub_fault_inner");
	kstub_fault_inner(2);
	return 0;
}

/* kprobe */

static ALONE void kstub_probed(int number)
{
	returned += number;
	AFTER_CALL();
}

static ALONE void kstub_returning(int number)
{
	kstub_probed(number);
	AFTER_CALL();
}

static ALONE int kstub_probe_handler(struct kprobe *probe, struct pt_regs *regs)
{
	panic("kstub_chain: in a kprobe");
	return 0;
}

static ALONE int kstub_return_handler(struct kretprobe_instance *instance, struct pt_regs *regs)
{
	AFTER_CALL();
	return 0;
}

static struct kprobe probe = { .symbol_name = "kstub_probed", .pre_handler = kstub_probe_handler };
static struct kretprobe return_probe = { .kp.symbol_name = "kstub_returning",
					 .handler = kstub_return_handler,
					 .maxactive = 4 };

static ALONE int kstub_probe_caller(void)
{
	kstub_returning(1);
	AFTER_CALL();
	return 0;
}

static int probes(void)
{
	int error = register_kretprobe(&return_probe) ?: register_kprobe(&probe);

	if (error)
		return error;
	expect("kstub_probe_handler,kstub_probed,kstub_returning,kstub_probe_caller");
	return kstub_probe_caller();
}

/* graph */

static ALONE void kstub_traced_inner(void)
{
	panic("kstub_chain: below traced functions");
	AFTER_CALL();
}

static ALONE int kstub_traced_outer(void)
{
	kstub_traced_inner();
	AFTER_CALL();
	return 0;
}

static ALONE int kstub_set_go(const char *value, const struct kernel_param *param)
{
	expect("kstub_traced_inner,kstub_traced_outer,kstub_set_go");
	kstub_traced_outer();
	AFTER_CALL();
	return 0;
}

static const struct kernel_param_ops go_ops = { .set = kstub_set_go };
module_param_cb(go, &go_ops, NULL, 0200);

/* bpf */

static struct kprobe helper_probe = { .symbol_name = "bpf_user_rnd_u32", .pre_handler = kstub_probe_handler };

/* nested */

static int nmis;

static ALONE int kstub_in_nested_nmi(unsigned int type, struct pt_regs *regs)
{
	int nothing;

	if (nmis++)
		nmi_panic(regs, "kstub_chain: in an NMI behind another");
	/* The return from this fault lets NMIs in again. */
	__get_kernel_nofault(&nothing, (int *)NOWHERE, int, faulted);
faulted:
	apic->send_IPI(smp_processor_id(), NMI_VECTOR);
	mdelay(20);
	AFTER_CALL();
	return NMI_HANDLED;
}

static ALONE int kstub_nested_task(void)
{
	apic->send_IPI(smp_processor_id(), NMI_VECTOR);
	mdelay(1000);
	AFTER_CALL();
	return 0;
}

static int nested(void)
{
	register_nmi_handler(NMI_LOCAL, kstub_in_nested_nmi, NMI_FLAG_FIRST, "kstub_chain");
	expect("kstub_in_nested_nmi,kstub_nested_task");
	return kstub_nested_task();
}

/* overflow */

static ALONE int kstub_recursion(int depth)
{
	volatile char room[256];

	room[0] = depth;
	room[255] = kstub_recursion(depth + 1);
	return room[0] + room[255];
}

static int overflow(void)
{
	expect("kstub_recursion");
	return kstub_recursion(0);
}

/* locks */

static DEFINE_SPINLOCK(kstub_held_spinlock);
static unsigned long kstub_held_bit = 1;

static ALONE int kstub_spinlock_spinner(void *unused)
{
	spin_lock(&kstub_held_spinlock);
	AFTER_CALL();
	return 0;
}

static ALONE int kstub_bit_spinner(void *unused)
{
	bit_spin_lock(0, &kstub_held_bit);
	AFTER_CALL();
	return 0;
}

static struct task_struct *spinner(int (*run)(void *), int cpu, const char *name)
{
	struct task_struct *task = kthread_create(run, NULL, "%s%d", name, cpu);

	if (IS_ERR(task))
		return NULL;
	kthread_bind(task, cpu);
	pr_info("kstub_chain: spinner pid=%d cpu=%d what=%s\n", task->pid, cpu, name);
	return task;
}

/* The first spins on the lock's own word, the second in the queue behind it. */
static int locks(void)
{
	struct task_struct *spinners[SPINLOCK_CPUS], *bit;
	int i;

	arch_spin_lock(&kstub_held_spinlock.rlock.raw_lock);
	pr_info("kstub_chain: how=locks\n");
	pr_info("kstub_chain: spinlock=0x%lx bit_lock=0x%lx\n",
		(unsigned long)&kstub_held_spinlock, (unsigned long)&kstub_held_bit);
	bit = spinner(kstub_bit_spinner, BIT_LOCK_CPU, "kstub_bitspin");
	for (i = 0; i < SPINLOCK_CPUS; i++) {
		spinners[i] = spinner(kstub_spinlock_spinner, FIRST_SPINLOCK_CPU + i, "kstub_spin");
		if (!spinners[i])
			return -ENOMEM;
		wake_up_process(spinners[i]);
		msleep(50);
	}
	if (!bit)
		return -ENOMEM;
	pr_info("kstub_chain: all spin\n");
	wake_up_process(bit);
	return 0;
}

static int __init start(void)
{
	if (!strcmp(how, "nmi"))
		return chain();
	if (!strcmp(how, "irq")) {
		fault_in_interrupt = true;
		return chain();
	}
	if (!strcmp(how, "fault"))
		return fault();
	if (!strcmp(how, "kprobe"))
		return probes();
	if (!strcmp(how, "graph"))
		return 0;
	if (!strcmp(how, "bpf"))
		return register_kprobe(&helper_probe);
	if (!strcmp(how, "nested"))
		return nested();
	if (!strcmp(how, "overflow"))
		return overflow();
	if (!strcmp(how, "locks"))
		return locks();
	pr_err("kstub_chain: how=%s is not known\n", how);
	return -EINVAL;
}

module_init(start);
MODULE_DESCRIPTION("ends the guest in ways that are hard to unwind");
MODULE_AUTHOR("kstub");
MODULE_LICENSE("GPL");
