// SPDX-License-Identifier: GPL-2.0
/*
 * Plants known state inside the kernel and says where: /proc/kstub_plant, a
 * key=value line for everything that a debugger should find.
 *
 * Every value is made from SEED, so a test can compute what it must read.
 */
#include <linux/completion.h>
#include <linux/delay.h>
#include <linux/hrtimer.h>
#include <linux/idr.h>
#include <linux/kthread.h>
#include <linux/list.h>
#include <linux/llist.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/percpu.h>
#include <linux/proc_fs.h>
#include <linux/radix-tree.h>
#include <linux/rbtree.h>
#include <linux/rwsem.h>
#include <linux/semaphore.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/timer.h>
#include <linux/version.h>
#include <linux/vmalloc.h>
#include <linux/wait.h>
#include <linux/workqueue.h>
#include <linux/xarray.h>
#if __has_include(<linux/maple_tree.h>)
#include <linux/maple_tree.h>
#define HAVE_MAPLE_TREE
#endif

#define SEED 0x6b737475622d6b76ull /* "kstub-kv" */
#define ITEMS 6
#define OBJECTS 120
#define FREED_EACH 4
#define VMALLOC_PAGES 5
#define ORDERS 4
#define REPORT_SIZE (64 << 10)

static char *report;
static size_t report_length;

static __printf(1, 2) void say(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	report_length += vscnprintf(report + report_length, REPORT_SIZE - report_length, format,
				    arguments);
	va_end(arguments);
}

#define SAY_POINTER(key, pointer) say("%s=0x%lx\n", key, (unsigned long)(pointer))

/* The i-th value of a kind; kinds are small numbers. */
static u64 seeded(unsigned int kind, unsigned int i)
{
	return SEED ^ ((u64)kind << 56) ^ (i * 0x0101010101010101ull);
}

static void fill(void *at, size_t length)
{
	u64 *word = at;

	for (; (char *)word < (char *)at + length; word++)
		*word = (unsigned long)word ^ SEED;
}

/* Per-CPU variables: the module's own, and allocated ones. */

struct kstub_percpu {
	u64 magic;
	int cpu;
	char name[16];
	u32 counters[4];
};

static DEFINE_PER_CPU(u64, kstub_percpu_value);
static DEFINE_PER_CPU(struct kstub_percpu, kstub_percpu_struct);
static u64 __percpu *kstub_percpu_dynamic;

static int plant_percpu(void)
{
	int cpu, i;

	kstub_percpu_dynamic = alloc_percpu(u64);
	if (!kstub_percpu_dynamic)
		return -ENOMEM;
	SAY_POINTER("percpu.value", &kstub_percpu_value);
	SAY_POINTER("percpu.struct", &kstub_percpu_struct);
	SAY_POINTER("percpu.dynamic", kstub_percpu_dynamic);
	SAY_POINTER("percpu.dynamic_variable", &kstub_percpu_dynamic);
	for_each_possible_cpu(cpu) {
		struct kstub_percpu *own = per_cpu_ptr(&kstub_percpu_struct, cpu);
		u64 *value = per_cpu_ptr(&kstub_percpu_value, cpu);
		u64 *dynamic = per_cpu_ptr(kstub_percpu_dynamic, cpu);

		*value = seeded(1, cpu);
		*dynamic = seeded(2, cpu);
		own->magic = seeded(3, cpu);
		own->cpu = cpu;
		snprintf(own->name, sizeof(own->name), "kstub-cpu-%d", cpu);
		for (i = 0; i < 4; i++)
			own->counters[i] = 1000 * cpu + i;
		say("percpu.value.%d.address=0x%lx\n", cpu, (unsigned long)value);
		say("percpu.value.%d=0x%llx\n", cpu, *value);
		say("percpu.dynamic.%d.address=0x%lx\n", cpu, (unsigned long)dynamic);
		say("percpu.dynamic.%d=0x%llx\n", cpu, *dynamic);
		say("percpu.struct.%d.address=0x%lx\n", cpu, (unsigned long)own);
		say("percpu.struct.%d.magic=0x%llx\n", cpu, own->magic);
	}
	return 0;
}

/* Lists and trees, good ones and broken ones. */

struct kstub_item {
	u64 magic;
	int number;
	struct list_head list;
	struct hlist_node hash;
	struct llist_node lockless;
	struct rb_node tree;
};

static LIST_HEAD(kstub_list);
static LIST_HEAD(kstub_list_empty);
static LIST_HEAD(kstub_list_cycle); /* the fourth's next is the second: the head is never met again */
static LIST_HEAD(kstub_list_poisoned); /* the third was deleted: LIST_POISON1 */
static LIST_HEAD(kstub_list_bad_prev); /* whole forwards, the third's prev is NULL */
static LIST_HEAD(kstub_list_unmapped); /* the third's next is a canonical address with nothing there */
static HLIST_HEAD(kstub_hlist);
static LLIST_HEAD(kstub_llist);
static struct rb_root kstub_rbtree = RB_ROOT;
static DEFINE_XARRAY(kstub_xarray);
static RADIX_TREE(kstub_radix_tree, GFP_KERNEL);
static DEFINE_IDR(kstub_idr);
#ifdef HAVE_MAPLE_TREE
static DEFINE_MTREE(kstub_maple_tree);
#endif

static struct kstub_item *new_item(unsigned int kind, int number)
{
	struct kstub_item *item = kzalloc(sizeof(*item), GFP_KERNEL);

	if (item) {
		item->magic = seeded(kind, number);
		item->number = number;
	}
	return item;
}

/* Returns the third item of a list of ITEMS. */
static struct kstub_item *plant_list(const char *name, struct list_head *head, unsigned int kind)
{
	struct kstub_item *item, *third = NULL;
	int i;

	say("list.%s.head=0x%lx\n", name, (unsigned long)head);
	for (i = 0; i < ITEMS; i++) {
		item = new_item(kind, i);
		if (!item)
			return NULL;
		list_add_tail(&item->list, head);
		say("list.%s.%d=0x%lx\n", name, i, (unsigned long)item);
		say("list.%s.%d.magic=0x%llx\n", name, i, item->magic);
		if (i == 2)
			third = item;
	}
	return third;
}

static int plant_lists(void)
{
	struct kstub_item *third;

	if (!plant_list("good", &kstub_list, 10))
		return -ENOMEM;
	SAY_POINTER("list.empty.head", &kstub_list_empty);
	third = plant_list("cycle", &kstub_list_cycle, 11);
	if (!third)
		return -ENOMEM;
	((struct list_head *)third->list.next)->next = third->list.prev;
	third = plant_list("poisoned", &kstub_list_poisoned, 12);
	if (!third)
		return -ENOMEM;
	third->list.next = LIST_POISON1;
	third = plant_list("bad_prev", &kstub_list_bad_prev, 13);
	if (!third)
		return -ENOMEM;
	third->list.prev = NULL;
	third = plant_list("unmapped", &kstub_list_unmapped, 14);
	if (!third)
		return -ENOMEM;
	third->list.next = (void *)0xffffffff00000000ul;
	say("list.poison1=0x%lx\n", (unsigned long)LIST_POISON1);
	return 0;
}

static void add_to_rbtree(struct kstub_item *item)
{
	struct rb_node **link = &kstub_rbtree.rb_node, *parent = NULL;

	while (*link) {
		parent = *link;
		link = item->number < rb_entry(parent, struct kstub_item, tree)->number ?
			       &parent->rb_left :
			       &parent->rb_right;
	}
	rb_link_node(&item->tree, parent, link);
	rb_insert_color(&item->tree, &kstub_rbtree);
}

static int plant_trees(void)
{
	struct kstub_item *item;
	unsigned long index;
	int i;

	SAY_POINTER("hlist.head", &kstub_hlist);
	SAY_POINTER("llist.head", &kstub_llist);
	SAY_POINTER("rbtree.root", &kstub_rbtree);
	SAY_POINTER("xarray", &kstub_xarray);
	SAY_POINTER("radix_tree", &kstub_radix_tree);
	SAY_POINTER("idr", &kstub_idr);
	for (i = 0; i < 20; i++) {
		/* 7 and 20 have no common factor: every number once, in disorder. */
		item = new_item(20, i * 7 % 20);
		if (!item)
			return -ENOMEM;
		hlist_add_head(&item->hash, &kstub_hlist);
		llist_add(&item->lockless, &kstub_llist);
		add_to_rbtree(item);
		/* Both lists have the last first. */
		say("hlist.%d=0x%lx\n", 19 - i, (unsigned long)item);
		say("llist.%d=0x%lx\n", 19 - i, (unsigned long)item);
		say("rbtree.%d=0x%lx\n", item->number, (unsigned long)item);

		/* 0, 1, 16, 81 ...: several levels deep. */
		index = (unsigned long)i * i * i * i;
		if (xa_err(xa_store(&kstub_xarray, index, i % 5 == 4 ? xa_mk_value(i) : item,
				    GFP_KERNEL)))
			return -ENOMEM;
		say("xarray.%lu=0x%lx\n", index,
		    i % 5 == 4 ? (unsigned long)xa_mk_value(i) : (unsigned long)item);
		if (i % 3 == 0) {
			xa_set_mark(&kstub_xarray, index, XA_MARK_1);
			say("xarray.marked.%lu=1\n", index);
		}
		if (radix_tree_insert(&kstub_radix_tree, 3ul * i, item))
			return -ENOMEM;
		say("radix_tree.%lu=0x%lx\n", 3ul * i, (unsigned long)item);
		if (i < 5)
			say("idr.%d=0x%lx\n",
			    idr_alloc(&kstub_idr, item, 100 * i, 100 * i + 1, GFP_KERNEL),
			    (unsigned long)item);
	}
#ifdef HAVE_MAPLE_TREE
	SAY_POINTER("maple_tree", &kstub_maple_tree);
	for (i = 0; i < 40; i++) {
		item = new_item(21, i);
		if (!item || mtree_store_range(&kstub_maple_tree, 100ul * i, 100ul * i + i, item,
					       GFP_KERNEL))
			return -ENOMEM;
		say("maple_tree.%lu-%lu=0x%lx\n", 100ul * i, 100ul * i + i, (unsigned long)item);
	}
#endif
	return 0;
}

/* Slab objects, pages, vmalloc. */

struct kstub_object {
	u64 magic;
	int number;
	u8 rest[180];
};

static struct kmem_cache *kstub_cache, *kstub_constructed_cache;
static struct kstub_object *kstub_objects[OBJECTS];
static void *kstub_kmalloc[6];
static void *kstub_vmalloc;
static struct page *kstub_pages[2 * ORDERS];

static void construct(void *at)
{
	((struct kstub_object *)at)->magic = seeded(31, 0);
}

static int plant_slab(void)
{
	int i, live = 0, freed = 0;

	/* A region for user copies, and a constructor: neither cache is merged with another. */
	kstub_cache = kmem_cache_create_usercopy("kstub_cache", sizeof(struct kstub_object), 0, 0,
						 0, 16, NULL);
	kstub_constructed_cache = kmem_cache_create("kstub_constructed",
						    sizeof(struct kstub_object), 0,
						    SLAB_HWCACHE_ALIGN, construct);
	if (!kstub_cache || !kstub_constructed_cache)
		return -ENOMEM;
	SAY_POINTER("slab.cache", kstub_cache);
	say("slab.cache.name=kstub_cache\nslab.cache.object_size=%zu\n",
	    sizeof(struct kstub_object));
	for (i = 0; i < OBJECTS; i++) {
		kstub_objects[i] = kmem_cache_zalloc(kstub_cache, GFP_KERNEL);
		if (!kstub_objects[i])
			return -ENOMEM;
		kstub_objects[i]->magic = seeded(30, i);
		kstub_objects[i]->number = i;
	}
	for (i = 0; i < OBJECTS; i++) {
		if (i % FREED_EACH == FREED_EACH - 1) {
			say("slab.freed.%d=0x%lx\n", freed++, (unsigned long)kstub_objects[i]);
			kmem_cache_free(kstub_cache, kstub_objects[i]);
			kstub_objects[i] = NULL;
		} else {
			say("slab.live.%d=0x%lx\n", live, (unsigned long)kstub_objects[i]);
			say("slab.live.%d.magic=0x%llx\n", live++, kstub_objects[i]->magic);
		}
	}
	say("slab.live=%d\nslab.freed=%d\n", live, freed);
	SAY_POINTER("slab.constructed_cache", kstub_constructed_cache);
	for (i = 0; i < 5; i++)
		say("slab.constructed.%d=0x%lx\n", i,
		    (unsigned long)kmem_cache_alloc(kstub_constructed_cache, GFP_KERNEL));
	return 0;
}

static int plant_memory(void)
{
	/* The last two are too big for any cache: whole pages. */
	static const size_t sizes[] = { 32, 100, 1000, 5000, 20000, 100000 };
	int i;

	for (i = 0; i < ARRAY_SIZE(sizes); i++) {
		kstub_kmalloc[i] = kmalloc(sizes[i], GFP_KERNEL);
		if (!kstub_kmalloc[i])
			return -ENOMEM;
		fill(kstub_kmalloc[i], sizes[i] & ~7ul);
		say("kmalloc.%zu=0x%lx\n", sizes[i], (unsigned long)kstub_kmalloc[i]);
	}
	kstub_vmalloc = vmalloc(VMALLOC_PAGES * PAGE_SIZE);
	if (!kstub_vmalloc)
		return -ENOMEM;
	fill(kstub_vmalloc, VMALLOC_PAGES * PAGE_SIZE);
	SAY_POINTER("vmalloc", kstub_vmalloc);
	say("vmalloc.size=%lu\n", VMALLOC_PAGES * PAGE_SIZE);
	for (i = 0; i < VMALLOC_PAGES; i++)
		say("vmalloc.%d.pfn=0x%lx\n", i, vmalloc_to_pfn(kstub_vmalloc + i * PAGE_SIZE));
	for (i = 0; i < 2 * ORDERS; i++) {
		int order = i / 2, compound = i % 2;

		kstub_pages[i] = alloc_pages(GFP_KERNEL | (compound ? __GFP_COMP : 0), order);
		if (!kstub_pages[i])
			return -ENOMEM;
		fill(page_address(kstub_pages[i]), PAGE_SIZE << order);
		say("pages.%d.%s=0x%lx\n", order, compound ? "compound" : "plain",
		    (unsigned long)kstub_pages[i]);
		say("pages.%d.%s.pfn=0x%lx\n", order, compound ? "compound" : "plain",
		    page_to_pfn(kstub_pages[i]));
		say("pages.%d.%s.virtual=0x%lx\n", order, compound ? "compound" : "plain",
		    (unsigned long)page_address(kstub_pages[i]));
	}
	say("page_zero=0x%lx\n", (unsigned long)ZERO_PAGE(0));
	return 0;
}

/* A structure with every kind of member. */

enum kstub_color { KSTUB_RED = 1, KSTUB_GREEN = 5, KSTUB_BLUE = -3 };

struct kstub_point {
	s16 x, y;
};

typedef u32 kstub_number_t;

struct kstub_everything {
	u8 byte;
	s8 negative;
	u16 half;
	kstub_number_t word;
	s64 quad;
	bool yes;
	char letter;
	unsigned int bits_a : 3;
	unsigned int bits_b : 7;
	int bits_signed : 5;
	u64 bits_wide : 40;
	enum kstub_color color;
	union {
		u32 number;
		u8 bytes[4];
		struct {
			u16 low, high;
		} halves;
	} shape;
	struct {
		int inside_x;
		union {
			int inside_y;
			u8 inside_byte;
		};
	};
	int matrix[2][3];
	struct kstub_point points[3];
	char text[16];
	const char *string;
	u64 (*function)(unsigned int kind, unsigned int i);
	struct kstub_everything *self;
	void *null;
	int count;
	u16 flexible[];
};

static struct kstub_everything *kstub_everything;

static int plant_structure(void)
{
	struct kstub_everything *it = kzalloc(struct_size(it, flexible, 4), GFP_KERNEL);
	int i, j;

	if (!it)
		return -ENOMEM;
	kstub_everything = it;
	it->byte = 0xa5;
	it->negative = -5;
	it->half = 0xbeef;
	it->word = 0xdeadbeef;
	it->quad = -1234567890123456789ll;
	it->yes = true;
	it->letter = 'k';
	it->bits_a = 5;
	it->bits_b = 99;
	it->bits_signed = -7;
	it->bits_wide = 0xabcdef0123ull;
	it->color = KSTUB_BLUE;
	it->shape.number = 0x11223344;
	it->inside_x = 17;
	it->inside_y = 0x7f123456;
	for (i = 0; i < 2; i++)
		for (j = 0; j < 3; j++)
			it->matrix[i][j] = 10 * i + j;
	for (i = 0; i < 3; i++)
		it->points[i] = (struct kstub_point){ .x = i, .y = -i };
	strscpy(it->text, "fifteen letters", sizeof(it->text));
	it->string = "a string of the module";
	it->function = seeded;
	it->self = it;
	it->count = 4;
	for (i = 0; i < 4; i++)
		it->flexible[i] = 0x1000 + i;
	SAY_POINTER("everything", it);
	SAY_POINTER("everything.variable", &kstub_everything);
	say("everything.byte=%u\neverything.negative=%d\neverything.half=%u\n", it->byte,
	    it->negative, it->half);
	say("everything.word=%u\neverything.quad=%lld\neverything.yes=%d\n", it->word, it->quad,
	    it->yes);
	say("everything.letter=%c\neverything.bits_a=%u\neverything.bits_b=%u\n", it->letter,
	    it->bits_a, it->bits_b);
	say("everything.bits_signed=%d\neverything.bits_wide=%llu\neverything.color=%d\n",
	    it->bits_signed, (u64)it->bits_wide, it->color);
	say("everything.color.name=KSTUB_BLUE\neverything.shape.number=%u\n", it->shape.number);
	say("everything.shape.halves.high=%u\neverything.inside_x=%d\neverything.inside_byte=%u\n",
	    it->shape.halves.high, it->inside_x, it->inside_byte);
	say("everything.matrix.1.2=%d\neverything.points.2.y=%d\neverything.text=%s\n",
	    it->matrix[1][2], it->points[2].y, it->text);
	SAY_POINTER("everything.string", it->string);
	SAY_POINTER("everything.function", it->function);
	say("everything.string.text=%s\neverything.count=%d\n", it->string, it->count);
	for (i = 0; i < 4; i++)
		say("everything.flexible.%d=%u\n", i, it->flexible[i]);
	say("everything.sizeof=%zu\neverything.offset.matrix=%zu\neverything.offset.flexible=%zu\n",
	    sizeof(*it), offsetof(struct kstub_everything, matrix),
	    offsetof(struct kstub_everything, flexible));
	return 0;
}

/* Locks that are held, and the threads that wait for them. */

static DEFINE_MUTEX(kstub_mutex);
static DEFINE_MUTEX(kstub_mutex_free);
static DECLARE_RWSEM(kstub_rwsem_written);
static DECLARE_RWSEM(kstub_rwsem_read);
static struct semaphore kstub_semaphore = __SEMAPHORE_INITIALIZER(kstub_semaphore, 0);
static DEFINE_SPINLOCK(kstub_spinlock);
static DEFINE_SPINLOCK(kstub_spinlock_free);
static DECLARE_COMPLETION(kstub_completion);
static DECLARE_WAIT_QUEUE_HEAD(kstub_wait_queue);
static DECLARE_COMPLETION(holder_ready);

static void sleep_for_ever(unsigned int state)
{
	for (;;) {
		__set_current_state(state);
		schedule();
	}
}

static int holder(void *unused)
{
	mutex_lock(&kstub_mutex);
	down_write(&kstub_rwsem_written);
	down_read(&kstub_rwsem_read);
	/* Without the preemption count, or sleeping would be a bug. */
	arch_spin_lock(&kstub_spinlock.rlock.raw_lock);
	complete(&holder_ready);
	sleep_for_ever(TASK_IDLE);
	return 0;
}

static int wait_mutex(void *unused)
{
	mutex_lock(&kstub_mutex);
	return 0;
}

static int wait_read(void *unused)
{
	down_read(&kstub_rwsem_written);
	return 0;
}

static int wait_write(void *unused)
{
	down_write(&kstub_rwsem_written);
	return 0;
}

static int wait_write_of_readers(void *unused)
{
	down_write(&kstub_rwsem_read);
	return 0;
}

static int wait_semaphore(void *unused)
{
	down(&kstub_semaphore);
	return 0;
}

static int wait_completion(void *unused)
{
	wait_for_completion(&kstub_completion);
	return 0;
}

static int wait_event_for_ever(void *unused)
{
	wait_event_interruptible(kstub_wait_queue, false);
	return 0;
}

static int wait_uninterruptible(void *unused)
{
	sleep_for_ever(TASK_UNINTERRUPTIBLE);
	return 0;
}

static int wait_idle(void *unused)
{
	sleep_for_ever(TASK_IDLE);
	return 0;
}

static int wait_timeout(void *unused)
{
	for (;;)
		schedule_timeout_interruptible(100000 * HZ);
	return 0;
}

static int wait_parked(void *unused)
{
	while (!kthread_should_stop()) {
		if (kthread_should_park())
			kthread_parkme();
		schedule_timeout_interruptible(1);
	}
	return 0;
}

static const struct {
	const char *name;
	int (*run)(void *unused);
	char state;
	const char *waits_for;
} threads[] = {
	{ "kstub_mutex_w0", wait_mutex, 'D', "kstub_mutex" },
	{ "kstub_mutex_w1", wait_mutex, 'D', "kstub_mutex" },
	{ "kstub_rwsem_r", wait_read, 'D', "kstub_rwsem_written" },
	{ "kstub_rwsem_w", wait_write, 'D', "kstub_rwsem_written" },
	{ "kstub_rwsem_w2", wait_write_of_readers, 'D', "kstub_rwsem_read" },
	{ "kstub_sem", wait_semaphore, 'D', "kstub_semaphore" },
	{ "kstub_compl", wait_completion, 'D', "kstub_completion" },
	{ "kstub_event", wait_event_for_ever, 'S', "kstub_wait_queue" },
	{ "kstub_dsleep", wait_uninterruptible, 'D', "" },
	{ "kstub_idle", wait_idle, 'I', "" },
	{ "kstub_timeout", wait_timeout, 'S', "" },
};

static struct task_struct *new_thread(int (*run)(void *), const char *name)
{
	struct task_struct *task = kthread_run(run, NULL, "%s", name);

	if (IS_ERR(task))
		return NULL;
	say("thread.%s.pid=%d\nthread.%s.task=0x%lx\n", name, task->pid, name,
	    (unsigned long)task);
	return task;
}

static int plant_locks(void)
{
	struct task_struct *task;
	int i;

	SAY_POINTER("lock.kstub_mutex", &kstub_mutex);
	SAY_POINTER("lock.kstub_mutex_free", &kstub_mutex_free);
	SAY_POINTER("lock.kstub_rwsem_written", &kstub_rwsem_written);
	SAY_POINTER("lock.kstub_rwsem_read", &kstub_rwsem_read);
	SAY_POINTER("lock.kstub_semaphore", &kstub_semaphore);
	SAY_POINTER("lock.kstub_spinlock", &kstub_spinlock);
	SAY_POINTER("lock.kstub_spinlock_free", &kstub_spinlock_free);
	SAY_POINTER("lock.kstub_completion", &kstub_completion);
	SAY_POINTER("lock.kstub_wait_queue", &kstub_wait_queue);
	task = new_thread(holder, "kstub_holder");
	if (!task)
		return -ENOMEM;
	wait_for_completion(&holder_ready);
	say("thread.kstub_holder.state=I\n");
	for (i = 0; i < ARRAY_SIZE(threads); i++) {
		if (!new_thread(threads[i].run, threads[i].name))
			return -ENOMEM;
		say("thread.%s.state=%c\nthread.%s.waits_for=%s\n", threads[i].name,
		    threads[i].state, threads[i].name, threads[i].waits_for);
		/* One after the other: the order of the waiters is known. */
		msleep(10);
	}
	task = new_thread(wait_parked, "kstub_parked");
	if (!task)
		return -ENOMEM;
	kthread_park(task);
	say("thread.kstub_parked.state=P\n");
	return 0;
}

/* Timers and work that never come due. */

static struct timer_list kstub_timer;
static struct hrtimer kstub_hrtimer;
static struct delayed_work kstub_work;

static void timer_function(struct timer_list *unused)
{
}

static enum hrtimer_restart hrtimer_function(struct hrtimer *unused)
{
	return HRTIMER_NORESTART;
}

static void work_function(struct work_struct *unused)
{
}

static void plant_timers(void)
{
	timer_setup(&kstub_timer, timer_function, 0);
	mod_timer(&kstub_timer, jiffies + 100000 * HZ);
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 13, 0)
	hrtimer_setup(&kstub_hrtimer, hrtimer_function, CLOCK_MONOTONIC, HRTIMER_MODE_REL);
#else
	hrtimer_init(&kstub_hrtimer, CLOCK_MONOTONIC, HRTIMER_MODE_REL);
	kstub_hrtimer.function = hrtimer_function;
#endif
	hrtimer_start(&kstub_hrtimer, ktime_set(1000000, 0), HRTIMER_MODE_REL);
	INIT_DELAYED_WORK(&kstub_work, work_function);
	schedule_delayed_work(&kstub_work, 100000 * HZ);
	SAY_POINTER("timer", &kstub_timer);
	say("timer.expires=%lu\n", kstub_timer.expires);
	SAY_POINTER("timer.function", timer_function);
	SAY_POINTER("hrtimer", &kstub_hrtimer);
	say("hrtimer.expires=%lld\n", ktime_to_ns(hrtimer_get_expires(&kstub_hrtimer)));
	SAY_POINTER("hrtimer.function", hrtimer_function);
	SAY_POINTER("work", &kstub_work);
	SAY_POINTER("work.function", work_function);
}

/* The log. */

static void plant_log(void)
{
	static char long_line[600];

	memset(long_line, 'L', sizeof(long_line) - 1);
	pr_err("kstub_plant: level 3 by task %d\n", current->pid);
	pr_warn("kstub_plant: level 4\n");
	pr_notice("kstub_plant: level 5\n");
	pr_info("kstub_plant: level 6\n");
	printk(KERN_DEBUG "kstub_plant: level 7\n");
	pr_info("kstub_plant: two\nlines\n");
	pr_info("kstub_plant: begun");
	pr_cont(", continued\n");
	pr_info("kstub_plant: %s\n", long_line);
	pr_info("kstub_plant: bytes \x02\x7f\xc3\xa9\\ and a tab\there\n");
	say("log.pid=%d\nlog.long=%zu\n", current->pid, sizeof(long_line) - 1);
}

static int kstub_parameter = 42;
module_param(kstub_parameter, int, 0444);
MODULE_PARM_DESC(kstub_parameter, "a parameter with a known value");

u64 kstub_exported_variable = SEED;
EXPORT_SYMBOL_GPL(kstub_exported_variable);

static int show_report(struct seq_file *file, void *unused)
{
	seq_write(file, report, report_length);
	return 0;
}

static int __init start(void)
{
	int error;

	report = vmalloc(REPORT_SIZE);
	if (!report)
		return -ENOMEM;
	/* This module is never unloaded, and says so with a count that is known. */
	__module_get(THIS_MODULE);
	__module_get(THIS_MODULE);
	say("seed=0x%llx\n", SEED);
	SAY_POINTER("module", THIS_MODULE);
	SAY_POINTER("report", report);
	SAY_POINTER("exported_variable", &kstub_exported_variable);
	say("exported_variable.value=0x%llx\nparameter=%d\nreferences=2\n",
	    kstub_exported_variable, kstub_parameter);
	error = plant_percpu() ?: plant_lists() ?: plant_trees() ?: plant_slab() ?:
		plant_memory() ?: plant_structure() ?: plant_locks();
	if (error)
		return error;
	plant_timers();
	plant_log();
	if (report_length + 1 >= REPORT_SIZE)
		return -ENOSPC;
	say("planted=1\n");
	return proc_create_single("kstub_plant", 0444, NULL, show_report) ? 0 : -ENOMEM;
}

module_init(start);
MODULE_DESCRIPTION("plants known state for tests of kstub");
MODULE_AUTHOR("kstub");
MODULE_LICENSE("GPL");
